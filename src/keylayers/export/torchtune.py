# SPDX-License-Identifier: Apache-2.0
"""torchtune: a builder that keeps LoRA on exactly the modules. Checked with torchtune 0.6.1.

A torchtune config can only put LoRA on all modules of a projection. So the export includes a custom
builder: it builds torchtune's model, then replaces the LoRA layers of unselected modules by plain
ones. torchtune renames modules; this file knows the names of dense models.
"""

import re

from keylayers.export.settings import Files, Settings, refuse, yaml_text

NAMES = {  # from torchtune's `models/convert_weights.py`
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.down_proj": "mlp.w2",
    "mlp.up_proj": "mlp.w3",
}

_BUILDER = '''"""A model of torchtune with LoRA on chosen modules alone.

Keep this file where `tune run` is started, or anywhere on PYTHONPATH.
"""

from torch import nn
from torchtune.config._utils import _get_component_from_path
from torchtune.modules.peft import DoRALinear, LoRALinear


def selected_lora(base_component, keep, **options):
    """The model that `base_component` builds with `options`, with LoRA on `keep` alone."""
    if options.get("quantize_base"):
        raise ValueError("quantize_base must be left out: only plain layers are given back")
    model = _get_component_from_path(base_component)(**options)
    adapted = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (LoRALinear, DoRALinear))
    }
    missing = sorted(set(keep) - set(adapted))
    if missing:
        raise ValueError(f"{base_component} must have LoRA on all of `keep`, but not on {missing}")
    for name in adapted.keys() - set(keep):
        layer = adapted[name]
        plain = nn.Linear(layer.in_dim, layer.out_dim, bias=layer.use_bias, device="meta")
        plain.weight = layer.weight
        if layer.use_bias:
            plain.bias = layer.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)
    return model
'''

_HEAD = """# The part of a config for `tune run lora_finetune_single_device` that says what is
# trained.
# base_component is torchtune's own builder of {model} with LoRA, such as
# torchtune.models.llama3_1.lora_llama3_1_8b; put it in.
"""


def export(settings: Settings) -> Files:
    """The builder, and the `model` section of a config."""
    if settings.fine_tune == "full":
        refuse("torchtune", "it has no full fine-tune of chosen modules; use `update` lora")
    if settings.selection.is_of_mixture:
        refuse("torchtune", "it has LoRA on all experts of a mixture or none; choose peft or trl")
    keep = [_name(name) for name in settings.names]
    kinds = {name.rpartition(".")[2] for name in keep}
    attention = [name.rpartition(".")[2] for name in NAMES.values() if name.startswith("attn.")]
    content = {
        "model": {
            "_component_": "keylayers_torchtune.selected_lora",
            "base_component": "???",  # OmegaConf's marker of a missing value
            "keep": keep,
            # torchtune needs at least one; the builder undoes those that are not in `keep`
            "lora_attn_modules": [kind for kind in attention if kind in kinds] or ["q_proj"],
            "apply_lora_to_mlp": bool(kinds & {"w1", "w2", "w3"}),
            "apply_lora_to_output": False,
            **settings.lora_options(),
        }
    }
    head = _HEAD.format(**settings.shown())
    return {"keylayers_torchtune.py": _BUILDER, "torchtune.yaml": head + yaml_text(content)}


def _name(name: str) -> str:
    """The name of a module in torchtune."""
    match = re.fullmatch(r"model\.(layers\.\d+\.)(.+)", name)
    if match is None or match[2] not in NAMES:
        refuse(
            "torchtune",
            f"its models have no {name}; those of the form of Llama, Mistral, Qwen and Gemma can "
            f"be exported, whose modules are {', '.join(NAMES)}",
        )
    return match[1] + NAMES[match[2]]
