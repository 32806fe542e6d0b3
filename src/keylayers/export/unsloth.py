# SPDX-License-Identifier: Apache-2.0
"""Unsloth: Python for both of its ways to load a model. Read from commit 015bdef0, not run.

`FastLanguageModel` needs a list, because it iterates over a string letter by letter. `FastModel`,
also for vision-language models, needs a string, which it passes on to PEFT; it shortens the names
in a list.
"""

from keylayers.export.settings import Files, Settings, refuse
from keylayers.ranking.targets import target_regex

_TEXT = '''# LoRA on exactly {count} modules of {model}.
MODULES = {names}
PATTERN = {pattern}


def selected_lora(loader, model):
    """New LoRA matrices on exactly the selected modules.

    `loader` is the class that loaded the model: FastLanguageModel, FastModel or FastVisionModel.
    """
    tuned = loader.get_peft_model(
        model,
        r={rank},
        lora_alpha={alpha},
        lora_dropout=0,
        bias="none",
        target_modules=MODULES if loader.__name__ == "FastLanguageModel" else PATTERN,
    )
    assert set(tuned.targeted_module_names) == set(MODULES), tuned.targeted_module_names
    return tuned
'''


def export(settings: Settings) -> Files:
    """A function that replaces `get_peft_model`."""
    if settings.fine_tune == "full":
        refuse("unsloth", "it has no full fine-tune of chosen modules; use `update` lora")
    if settings.selection.is_of_mixture:
        refuse("unsloth", "in a mixture of experts PEFT rewrites what it is given; choose peft")
    pattern = repr(target_regex(settings.names))
    return {"selected_unsloth.py": _TEXT.format(**settings.shown(), pattern=pattern)}
