# SPDX-License-Identifier: Apache-2.0
"""Work on a caller's model and restore it exactly."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from keylayers.errors import GuardError
from keylayers.model.sharding import reshard
from keylayers.model.weights import fingerprint


def to_evaluation(model: nn.Module) -> None:
    """Switch to evaluation mode, but leave 4-bit layers in training mode.

    In evaluation mode on a CPU, bitsandbytes repacks a 4-bit weight permanently and rounds its
    scales. Nothing else in such a layer depends on the mode.
    """
    model.eval()
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.training = True


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters inside the block, then restore the model and the random state.

    Restores flags, gradients, modes and every other attribute of every module: hooks, active
    adapters, gradient checkpointing. Weights and saved buffers must not change inside the block.

    Raises:
        GuardError: a weight or saved buffer changed inside the block; the message names the first
            ones.
    """
    reshard(model)
    random_state = _random_state()
    parameters = list(model.named_parameters(remove_duplicate=False))
    flags = [(parameter, parameter.requires_grad, parameter.grad) for _, parameter in parameters]
    attributes = [_Attributes(module) for module in model.modules()]
    before = fingerprint(model.state_dict().items())
    for parameter, _, _ in flags:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        try:
            yield
        finally:
            reshard(model)
            for module_attributes in attributes:
                module_attributes.restore()
            for parameter, requires_grad, grad in flags:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
        # After the restoration: in the block, PEFT may have put modules around others.
        _check_unchanged(before, fingerprint(model.state_dict().items()))
    finally:
        _set_random_state(random_state)


class _Attributes:
    """A copy of a module's attributes, because trainers switch modes and add and remove hooks."""

    def __init__(self, module: nn.Module) -> None:
        self._attributes = vars(module)
        self._values = dict(self._attributes)
        # Hooks, buffers and submodules. A hook's handle refers to the dictionary itself, so the
        # dictionaries are refilled and not replaced.
        dictionaries = (value for value in self._values.values() if isinstance(value, dict))
        self._copies = [(dictionary, dict(dictionary)) for dictionary in dictionaries]

    def restore(self) -> None:
        """Give the module its attributes back."""
        self._attributes.clear()
        self._attributes.update(self._values)
        for dictionary, copy in self._copies:
            dictionary.clear()
            dictionary.update(copy)


def _check_unchanged(before: dict[str, int], after: dict[str, int]) -> None:
    changed = [name for name in before if after.get(name) != before[name]]
    if changed:
        names = ", ".join(changed[:3])
        raise GuardError(
            f"the weights of a model must not change while it is scored or measured, but "
            f"{len(changed)} tensors did, first {names}; something else trains it at the same time"
        )


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # the global state that trainers seed
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
