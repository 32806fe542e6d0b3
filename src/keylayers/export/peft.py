# SPDX-License-Identifier: Apache-2.0
"""PEFT: an `adapter_config.json`, and Python that checks the targets. Checked with peft 0.21."""

import json
from pprint import pformat

from keylayers.export.settings import Files, Settings

_LORA = '''# LoRA on exactly {count} modules of {model}.
from peft import LoraConfig, get_peft_model

MODULES = {names}


def selected_lora(model):
    """The model with new LoRA matrices on exactly the selected modules."""
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r={rank},
        lora_alpha={alpha},
        lora_dropout=0.0,
{targets}
    )
    tuned = get_peft_model(model, config)
    hit = set(tuned.targeted_module_names) | set(tuned.targeted_parameter_names)
    hit = {{name.removesuffix(".weight") for name in hit}}
    assert hit == set(MODULES), hit ^ set(MODULES)
    return tuned
'''
_FULL = '''# Trains exactly {count} modules of {model}, without an adapter.
MODULES = {names}


def train_only_selected(model):
    """Freeze all but the selected modules; call it before the trainer is built."""
    parameters = dict(model.named_parameters())
    model.requires_grad_(False)
    for name in MODULES:
        own = [one for one in (name, name + ".weight", name + ".bias") if one in parameters]
        assert own, name
        for one in own:
            parameters[one].requires_grad_(True)
    return model
'''


def export(settings: Settings) -> Files:
    """The config of a new adapter, and the Python code that creates it."""
    shown = settings.shown()
    if settings.fine_tune == "full":
        return {"selected.py": _FULL.format(**shown)}
    targets = settings.selection.lora_targets
    options = settings.lora_options("r")
    patterns = {name: value for name, value in options.items() if name.endswith("_pattern")}
    lines = (
        f"        {name}={pformat(value, width=80)},"
        for name, value in (targets | patterns).items()
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": settings.model,
        **options,
        "bias": "none",
        **targets,
    }
    return {
        "adapter_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n",
        "selected.py": _LORA.format(**shown, targets="\n".join(lines)),
    }
