# SPDX-License-Identifier: Apache-2.0
"""Work on somebody else's model and give it back exactly as it was."""

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
    """Evaluation mode, without what libraries do to weights in it.

    In evaluation on a CPU bitsandbytes packs a 4-bit weight anew, for good, and rounds its scales.
    Such a layer has nothing else that depends on its mode.
    """
    model.eval()
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.training = True


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters for the block, then restore flags, gradients, modes and random state.

    And every attribute of every module: hooks, active adapters, switches for checkpointing.
    Weights and saved buffers are compared before and after: they must not change inside the block.

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
            reshard(model)
            after = fingerprint(model.state_dict().items())
        finally:
            reshard(model)
            for one in attributes:
                one.restore()
            for parameter, requires_grad, grad in flags:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
        _check_unchanged(before, after)
    finally:
        _set_random_state(random_state)


class _Attributes:
    """What a module holds under each name; trainers switch, hook and unhook as they go."""

    def __init__(self, module: nn.Module) -> None:
        self._attributes = vars(module)
        self._values = dict(self._attributes)
        held = (value for value in self._values.values() if isinstance(value, dict))
        self._contents = [(one, dict(one)) for one in held]  # hooks, buffers, parts

    def restore(self) -> None:
        """Give the module its attributes back; handles of hooks know their dictionaries."""
        self._attributes.clear()
        self._attributes.update(self._values)
        for held, contents in self._contents:
            held.clear()
            held.update(contents)


def _check_unchanged(before: dict[str, int], after: dict[str, int]) -> None:
    changed = [name for name in before if after.get(name) != before[name]]
    if changed:
        names = ", ".join(changed[:3])
        raise GuardError(
            f"only gates may change while scores are learned, but {len(changed)} tensors of the "
            f"model changed, first {names}; something else trains it at the same time"
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
