# SPDX-License-Identifier: Apache-2.0
"""A selection as a PEFT adapter on exactly those modules, and the proof of it.

PEFT drops unknown names without a word and condenses lists of 20 names and more before saving, so
that they can match more on another model. A grouped regular expression is saved as it is and stays
exact. On mixtures of experts PEFT rewrites targets: an expression hits every block, and the dense
feed-forward of one block becomes the experts of the others. There attention goes by a list of
names, and everything that PEFT would rewrite by the names of its parameters. Either way, what PEFT
really hit is compared with what was asked, and anything else is refused.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from keylayers.errors import GuardError, ModelError
from keylayers.model_map import base_model_of, map_modules
from keylayers.updates.adapter import always_on, own_parameters, tuner_layers

REWRITTEN = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Last names that PEFT takes for those of experts in the models whose experts it knows."""


def lora_config(
    names: Sequence[str], *, stacked: Collection[str] | None = None, **options: Any
) -> LoraConfig:
    """A `LoraConfig` whose target is exactly `names`.

    Args:
        names: Full module names in the base model.
        stacked: Those of `names` that are stacked experts; empty if the model has experts but
            `names` holds none, None if it has none.
        options: Everything else of `LoraConfig`, such as `r` and `lora_alpha`.
    """
    if "target_modules" in options:
        raise TypeError("`target_modules` comes from the selection; leave it out")
    options.setdefault("task_type", "CAUSAL_LM")
    return LoraConfig(**lora_targets(names, stacked), **options)


def lora_targets(names: Sequence[str], stacked: Collection[str] | None) -> dict[str, Any]:
    """The fields of a PEFT config that put LoRA on exactly `names`; as `lora_config` takes them."""
    if stacked is None:
        return {"target_modules": target_regex(names)}
    modules, parameters = [], []
    for name in names:
        if name in stacked:
            parameters.append(name)
        elif name.rpartition(".")[2] in REWRITTEN:
            parameters.append(f"{name}.weight")
        else:
            modules.append(name)
    return {"target_modules": modules, "target_parameters": parameters}


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

    Args:
        model: The base model.
        names: Full module names.
        options: Of `LoraConfig`, or of `AdaLoraConfig` if `total_step` is among them.

    Raises:
        ModelError: PEFT cannot hit exactly these modules; says which are missing or too many.
    """
    known = dict(model.named_modules())
    options.setdefault("task_type", "CAUSAL_LM")
    experts = {info.name for info in map_modules(model, "all") if info.is_stacked}
    options |= lora_targets(names, experts.intersection(names) if experts else None)
    if any(isinstance(known.get(name), Conv1D) for name in names):
        options["fan_in_fan_out"] = True
    kind = AdaLoraConfig if "total_step" in options else LoraConfig
    try:
        tuned = get_peft_model(model, kind(**options))
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"PEFT cannot put this adapter on the model: {reason}") from error
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
    trainable = trainable_modules(model)
    hit = set(tuner_layers(model))
    if isinstance(model, PeftModel) and hit != asked:
        raise ModelError(
            f"PEFT must put an adapter on exactly the selected modules, but missed "
            f"{sorted(asked - hit)[:3]} and added {sorted(hit - asked)[:3]}; for some mixtures of "
            f"experts PEFT rewrites the targets"
        )
    if trainable != asked:
        odd = sorted(trainable ^ asked)
        raise GuardError(
            f"the trainable modules must be exactly the selection, but {len(odd)} differ, first "
            f"{odd[0]}"
        )


def trainable_modules(model: nn.Module) -> set[str]:
    """Names, in the base model, of the modules that hold a trainable parameter.

    The adapter's `modules_to_save`, such as a classification head, are not among them.
    """
    base = base_model_of(model)
    owners = {
        id(one): name
        for name, layer in tuner_layers(model).items()
        for one in own_parameters(layer)
    }
    experts = {info.name for info in map_modules(model, "all")}
    heads = tuple(f"{name}." for name in always_on(model))
    found = set()
    for name, parameter in base.named_parameters():
        if parameter.requires_grad and not name.startswith(heads):
            plain = name.replace(".base_layer", "")
            own = plain if plain in experts else plain.rpartition(".")[0]
            found.add(owners.get(id(parameter), own))
    return found
