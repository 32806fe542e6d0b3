# SPDX-License-Identifier: Apache-2.0
"""Work on somebody else's model and give it back exactly as it was."""

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from keylayers.errors import GuardError
from keylayers.weights import fingerprint


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters for the block, then restore flags, gradients, modes and random state.

    Weights and saved buffers are compared before and after: they must not change inside the block.

    Raises:
        GuardError: a weight or saved buffer changed inside the block; the message names the first
            ones.
    """
    random_state = _random_state()
    parameters = list(model.named_parameters(remove_duplicate=False))
    flags = [(parameter, parameter.requires_grad, parameter.grad) for _, parameter in parameters]
    modes = [(module, module.training) for module in model.modules()]
    before = fingerprint(model.state_dict().items())
    for parameter, _, _ in flags:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        try:
            with _no_thaw(model):
                yield
        finally:
            for parameter, requires_grad, grad in flags:
                parameter.requires_grad_(requires_grad)
                parameter.grad = grad
            for module, mode in modes:
                module.training = mode
        _check_unchanged(before, fingerprint(model.state_dict().items()))
    finally:
        _set_random_state(random_state)


@contextlib.contextmanager
def _no_thaw(model: nn.Module) -> Iterator[None]:
    """Keep PEFT from making frozen weights trainable when a trainer switches adapters.

    A preference trainer leaves the adapter for its reference pass and comes back to it, and PEFT
    takes coming back for training. Layers are asked by their public methods; what these thaw is
    frozen again before any pass.
    """
    with contextlib.ExitStack() as stack:
        for layer in model.modules():
            if isinstance(layer, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                for name in ("set_adapter", "enable_adapters"):
                    setattr(layer, name, _freezing(layer, getattr(layer, name)))
                    stack.callback(delattr, layer, name)  # the class's own method shows again
        yield


def _freezing(layer: nn.Module, method: Callable[..., None]) -> Callable[..., None]:
    """`method`, and then every weight of `layer` that is there now frozen again."""
    frozen = list(layer.parameters())  # not the gate, which comes later

    def call(*args: Any, **kwargs: Any) -> None:
        method(*args, **kwargs)
        for parameter in frozen:
            parameter.requires_grad_(False)

    return call


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
