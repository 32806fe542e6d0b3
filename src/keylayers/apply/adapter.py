# SPDX-License-Identifier: Apache-2.0
"""A selection as a PEFT adapter on exactly those modules, and the proof of it.

PEFT drops unknown names without a word, so what it really hit is compared with what was asked, and
anything else is refused.
"""

from collections.abc import Sequence
from typing import Any

from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from keylayers.errors import GuardError, ModelError
from keylayers.model.modules import base_model_of, map_modules
from keylayers.ranking.targets import lora_targets
from keylayers.updates.adapter import always_on, own_parameters, tuner_layers


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
        id(parameter): name
        for name, layer in tuner_layers(model).items()
        for parameter in own_parameters(layer)
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
