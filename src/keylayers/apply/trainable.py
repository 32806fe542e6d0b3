# SPDX-License-Identifier: Apache-2.0
"""Make exactly a selection trainable, as a PEFT adapter or as `requires_grad` flags, and prove it.

PEFT drops unknown names without a word, so we compare what it really hit with what was asked, and
refuse anything else.
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from keylayers.errors import GuardError, ModelError
from keylayers.model.modules import base_model_of, map_modules
from keylayers.model.sharding import whole
from keylayers.ranking.targets import lora_targets, rank_options
from keylayers.updates.adapter import FALSE_ALARM, always_on, own_parameters, tuner_layers


def add_lora(
    model: PreTrainedModel, names: Sequence[str] | Mapping[str, int], **options: Any
) -> PeftModel:
    """`model` wrapped by PEFT with new LoRA matrices on exactly `names`, only these trainable.

    The options are those of `LoraConfig`, or of `AdaLoraConfig` if `total_step` is among them.
    With ranks by name, their scaling is `lora_alpha / r` of the options in every module.
    """
    known = dict(model.named_modules())
    options.setdefault("task_type", "CAUSAL_LM")
    experts = {info.name for info in map_modules(model, "all") if info.is_stacked}
    options |= lora_targets(list(names), experts or None)
    if isinstance(names, Mapping):
        scaling = options["lora_alpha"] / options["r"]
        options |= rank_options(names, scaling, experts or None)
    if any(isinstance(known.get(name), Conv1D) for name in names):
        options["fan_in_fan_out"] = True
    kind = AdaLoraConfig if "total_step" in options else LoraConfig
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", FALSE_ALARM, RuntimeWarning)
            tuned = get_peft_model(model, kind(**options))
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"PEFT cannot put this adapter on the model: {reason}") from error
    layers = tuner_layers(tuned)
    hit, asked = set(layers), set(names)
    if hit != asked:
        raise ModelError(
            f"PEFT must put an adapter on exactly the selected modules, but missed "
            f"{sorted(asked - hit)[:3]} and added {sorted(hit - asked)[:3]}; for some mixtures of "
            f"experts PEFT rewrites the targets"
        )
    if isinstance(names, Mapping):
        prove_ranks(tuned, names)
    prove_trainable(tuned, names)
    return tuned


def train_only(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze every parameter but weight and bias of the modules `names`, and prove it."""
    known = {info.name for info in map_modules(model, "all")}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ModelError(f"every selected module must be in the model, but {unknown[0]} is not")
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    for name in names:  # stacked experts are a parameter, not a module
        part = parameters[name] if name in parameters else model.get_submodule(name)
        part.requires_grad_(True)
    prove_trainable(model, names)


def prove_trainable(model: nn.Module, names: Collection[str]) -> None:
    """Raise a GuardError unless the modules that hold trainable parameters are exactly `names`."""
    differ = trainable_modules(model).keys() ^ set(names)
    if differ:
        raise GuardError(
            f"the trainable modules must be exactly the selection, but {len(differ)} differ, first "
            f"{min(differ)}"
        )


def prove_ranks(tuned: PeftModel, ranks: Mapping[str, int]) -> None:
    """Raise a GuardError unless LoRA has these ranks by module."""
    layers = tuner_layers(tuned)
    for name, rank in ranks.items():
        if (own := layers[name].r[tuned.active_adapter]) != rank:
            raise GuardError(f"PEFT must give {name} the rank {rank}, but gives it {own}")


def trainable_modules(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Name in the base model of each module that is trained -> its trainable parameters.

    A PEFT layer counts for the module that it wraps. The adapter's `modules_to_save`, such as the
    head of a reward model, which PEFT trains and saves whole, do not count.
    """
    owners = {
        id(parameter): name
        for name, layer in tuner_layers(model).items()
        for parameter in own_parameters(layer)
    }
    experts = {info.name for info in map_modules(model, "all")}
    heads = tuple(f"{name}." for name in always_on(model))
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in base_model_of(model).named_parameters():
        if parameter.requires_grad and not name.startswith(heads):
            plain = name.replace(".base_layer", "")
            own = plain if plain in experts else plain.rpartition(".")[0]
            found.setdefault(owners.get(id(parameter), own), []).append(parameter)
    return found


def prove_unchanged_elsewhere(
    model: nn.Module, base: Mapping[str, Tensor], names: Sequence[str]
) -> None:
    """Raise a GuardError if a tuned model differs from its base outside the modules `names`.

    The model has the dtype that it is stored in; `base` holds the base's tensors by name.
    """
    selected = {f"{name}{kind}" for name in names for kind in ("", ".weight", ".bias")}
    changed = [
        name
        for name, parameter in model.named_parameters()
        if name in base
        and name not in selected
        and not torch.equal(whole(parameter).cpu(), base[name].to(parameter.dtype))
    ]
    if changed:
        raise GuardError(
            f"only selected weights may change, but {len(changed)} others did, first {changed[0]}"
        )
