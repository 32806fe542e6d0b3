# SPDX-License-Identifier: Apache-2.0
"""A selection as a PEFT adapter on exactly those modules, and the proof of it.

PEFT drops unknown names without a word and condenses lists of 20 names and more before saving, so
that they can match more on another model. A grouped regular expression is saved as it is and stays
exact; still, what PEFT really hit is compared with what was asked, and anything else is refused.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from peft import LoraConfig, PeftModel, PeftModelForSequenceClassification, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from keylayers.errors import GuardError, ModelError
from keylayers.model_map import base_model_of


def lora_config(names: Sequence[str], **options: Any) -> LoraConfig:
    """A `LoraConfig` whose target is exactly `names`.

    Args:
        names: Full module names in the base model.
        options: Everything else of `LoraConfig`, such as `r` and `lora_alpha`.
    """
    if "target_modules" in options:
        raise TypeError("`target_modules` comes from the selection; leave it out")
    options.setdefault("task_type", "CAUSAL_LM")
    return LoraConfig(target_modules=target_regex(names), **options)


def target_regex(names: Iterable[str]) -> str:
    r"""One regular expression that fully matches `names` and no other module name.

    Names that differ only in their block are grouped:
    `model\.layers\.(?:(?:5|7)\.mlp\.down_proj|...)`.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = re.match(r"(.*?\.)(\d+)(\..*)", name)
        prefix, index, suffix = match.groups() if match else (name, "", "")
        groups.setdefault((prefix, suffix), []).append(index)
    by_prefix: dict[str, list[str]] = {}
    for (prefix, suffix), indices in groups.items():
        numbers = indices[0] if len(indices) == 1 else f"(?:{'|'.join(indices)})"
        by_prefix.setdefault(re.escape(prefix), []).append(numbers + re.escape(suffix))
    parts = [
        prefix + (tails[0] if len(tails) == 1 else f"(?:{'|'.join(tails)})")
        for prefix, tails in by_prefix.items()
    ]
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


def add_lora(model: PreTrainedModel, names: Sequence[str], **options: Any) -> PeftModel:
    """`model` wrapped by PEFT with new LoRA matrices on exactly `names`, only these trainable.

    Raises:
        ModelError: PEFT cannot hit exactly these modules; says which are missing or too many.
    """
    known = dict(model.named_modules())
    is_transposed = any(isinstance(known.get(name), Conv1D) for name in names)
    tuned = get_peft_model(model, lora_config(names, fan_in_fan_out=is_transposed, **options))
    prove_trainable(tuned, names)
    return tuned


def prove_trainable(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse a model whose trainable modules are not exactly `names`.

    A module counts as trainable if any parameter of it, or of the PEFT layer around it, has
    `requires_grad`. The head of a reward model, which PEFT trains and saves whole, does not count.

    Raises:
        ModelError: PEFT hit other modules than it was asked to.
        GuardError: something outside the blocks' modules is trainable.
    """
    asked = set(names)
    trainable = trainable_modules(model) - _whole_heads(model)
    if isinstance(model, PeftModel) and set(model.targeted_module_names) != asked:
        missed = sorted(asked - set(model.targeted_module_names))
        extra = sorted(set(model.targeted_module_names) - asked)
        raise ModelError(
            f"PEFT must put an adapter on exactly the selected modules, but missed {missed[:3]} "
            f"and added {extra[:3]}; for some mixture-of-experts models PEFT rewrites the targets, "
            f"which is not supported yet"
        )
    if trainable != asked:
        odd = sorted(trainable ^ asked)
        raise GuardError(
            f"the trainable modules must be exactly the selection, but {len(odd)} differ, first "
            f"{odd[0]}"
        )


def _whole_heads(model: nn.Module) -> set[str]:
    """Names of what PEFT trains whole beside a reward model's adapter, as `trainable_modules`."""
    if not isinstance(model, PeftModelForSequenceClassification):
        return set()
    return {
        f"{name}.{inner}"
        for name, head in base_model_of(model).named_modules()
        if isinstance(head, ModulesToSaveWrapper)
        for inner, _ in head.named_modules()
    }


def trainable_modules(model: nn.Module) -> set[str]:
    """Names, in the base model, of the modules that hold a trainable parameter."""
    base = base_model_of(model)
    wrapped = [name for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)]
    found = set()
    for name, parameter in base.named_parameters():
        if parameter.requires_grad:
            owners = [layer for layer in wrapped if name.startswith(layer + ".")]
            found.add(owners[0] if owners else name.rpartition(".")[0])
    return found
