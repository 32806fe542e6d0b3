# SPDX-License-Identifier: Apache-2.0
"""Stop training some LoRA updates while the rest of the model goes on, and prove it.

The parameters stay in the optimiser's groups but have no gradient, so optimisers skip them. Without
them in the groups, a run could not load the optimiser's state from a checkpoint, because trainers
build the optimiser of all parameters before they call any callback.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from torch.optim import Optimizer

from keylayers.apply.trainable import prove_trainable, trainable_modules
from keylayers.errors import GuardError, ModelError
from keylayers.model.sharding import is_sharded
from keylayers.model.weights import fingerprint
from keylayers.training.options import FreezeAction
from keylayers.updates import AdapterUpdate, adapter_updates
from keylayers.updates.adalora import is_adalora


@dataclass(frozen=True)
class HaltedUpdates:
    """LoRA matrices that are no longer trained, with their fingerprints from when that stopped."""

    parameters: dict[str, nn.Parameter]
    before: dict[str, int]

    def check(self) -> None:
        """Raise a GuardError if a matrix has changed or can be trained."""
        after = fingerprint(self.parameters.items())
        moved = [
            name
            for name, parameter in self.parameters.items()
            if parameter.requires_grad or after[name] != self.before[name]
        ]
        if moved:
            raise GuardError(
                f"frozen weights must not change, but {len(moved)} LoRA matrices did, first "
                f"{moved[0]}; something else trains or sets them"
            )


def check_can_halt(model: nn.Module, action: FreezeAction) -> None:
    """Refuse a model whose updates `action` would not treat exactly, before any training."""
    if not isinstance(model, PeftModel):
        raise ModelError(
            f"the model must carry a LoRA adapter, got a plain {type(model).__name__}: a "
            f"checkpoint does not hold the weights that a full fine-tune started from; use "
            f"`keylayers rank`, then `keylayers train --update full`"
        )
    if is_adalora(model):
        raise ModelError(
            "no module may be frozen while AdaLoRA moves its budget between all of them; use lora, "
            "or `keylayers rank --update adalora` and then train its selection"
        )
    for update in adapter_updates(model):
        odd = {name.partition(".")[0] for name in _own(update)} - {"lora_A", "lora_B"}
        if action == "remove" and odd:
            raise ModelError(
                f"with `action` remove an update must be zero when its B is, which it is not for "
                f"{update.module.name} with {', '.join(sorted(odd))}; use `action` freeze"
            )


def halt_updates(
    model: nn.Module, names: Collection[str], action: FreezeAction, optimizer: Optimizer
) -> HaltedUpdates:
    """Between two steps, stop training the LoRA updates of the modules `names`.

    `freeze` leaves the updates as they are, `remove` sets them to zero.
    """
    kept = trainable_modules(model).keys() - set(names)
    parameters = {
        f"{update.module.name}.{name}": parameter
        for update in adapter_updates(model)
        if update.module.name in names
        for name, parameter in _own(update).items()
    }
    # accelerate wraps optimisers. Under FSDP a checkpoint must hold the state of every parameter.
    state = {} if is_sharded(model) else getattr(optimizer, "optimizer", optimizer).state
    for name, parameter in parameters.items():
        parameter.requires_grad_(False)
        parameter.grad = None
        state.pop(parameter, None)
        if action == "remove" and ".lora_B." in name:
            with torch.no_grad():
                parameter.zero_()
    prove_trainable(model, kept)
    return HaltedUpdates(parameters, fingerprint(parameters.items()))


def _own(update: AdapterUpdate) -> dict[str, nn.Parameter]:
    """The parameters of the update's own adapter, by their names in its layer."""
    return {
        name: parameter
        for name, parameter in update.layer.named_parameters()
        if name.partition(".")[0] != "base_layer" and update.adapter in name.split(".")
    }
