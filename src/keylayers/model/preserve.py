# SPDX-License-Identifier: Apache-2.0
"""Work on a caller's model or trainer and restore it exactly."""

import contextlib
import copy
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import Trainer

from keylayers.errors import GuardError
from keylayers.model.sharding import reshard
from keylayers.model.weights import fingerprint

SWITCHES = ("set_adapter", "enable_adapters", "set_requires_grad")  # of adapters, in PEFT


def to_evaluation(model: nn.Module) -> None:
    """Switch to evaluation mode, but leave 4-bit layers in training mode.

    In evaluation mode on a CPU, bitsandbytes repacks their weights for good and rounds the scales.
    """
    model.eval()
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.training = True


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Freeze all parameters inside the block, then restore the model and the random state.

    Restores flags, gradients and every attribute of every module. Raises a GuardError if a weight
    or a saved buffer changed inside the block.
    """
    attributes = [vars(module) for module in model.modules()]  # hooks, buffers, children: in dicts
    held = [value for own in attributes for value in own.values() if isinstance(value, dict)]
    with _same_random_state():
        reshard(model)
        before = fingerprint(model.state_dict().items())
        with restored([*attributes, *held]), _frozen(model):
            yield
        # After the restoration: in the block, PEFT may have put modules around others.
        after = fingerprint(model.state_dict().items())
        changed = [name for name in before if after.get(name) != before[name]]
        if changed:
            raise GuardError(
                f"the weights of a model must not change while it is scored or measured, but "
                f"{len(changed)} tensors did, first {', '.join(changed[:3])}; an adapter or "
                f"another training changed them"
            )


@contextlib.contextmanager
def restored(dictionaries: Iterable[dict[Any, Any]]) -> Iterator[None]:
    """Refill the dictionaries after the block; a hook's handle refers to the dictionary itself."""
    copies = [(dictionary, dict(dictionary)) for dictionary in dictionaries]
    try:
        yield
    finally:
        for dictionary, content in copies:
            dictionary.clear()
            dictionary.update(content)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    parameters = list(model.parameters())
    states = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    try:
        yield
    finally:
        reshard(model)
        for parameter, (requires_grad, grad) in zip(parameters, states, strict=True):
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextlib.contextmanager
def kept_frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block, switching adapters unfreezes no weight that was frozen at its start.

    PEFT 0.21 sets `requires_grad` on each adapter that it activates, even one that was loaded
    frozen (https://github.com/huggingface/peft/issues/3447). Trainers with a reference (DPO, KTO,
    GRPO) switch to a second adapter, or to none, and back in every loss. The second loss would then
    compute gradients of all LoRA weights, and under gradient checkpointing a recomputed activation
    would not match the first.

    Wraps three public methods of each PEFT layer; other layers are left alone.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    for layer in layers:
        frozen = [weight for weight in layer.parameters() if not weight.requires_grad]
        for name in SWITCHES:
            setattr(layer, name, partial(_switch_and_freeze, getattr(layer, name), frozen))
    try:
        yield
    finally:
        for layer in layers:
            for name in SWITCHES:
                delattr(layer, name)  # uncovers the class's own method


def _switch_and_freeze(
    switch: Callable[..., None], frozen: list[nn.Parameter], *args: Any, **named: Any
) -> None:
    switch(*args, **named)
    for parameter in frozen:
        parameter.requires_grad_(False)


@contextlib.contextmanager
def _same_random_state() -> Iterator[None]:
    """Restore the random states of Python, torch and numpy (the global one: trainers seed it)."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices, device_type="cuda"):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextlib.contextmanager
def unchanged_trainer(trainer: Trainer) -> Iterator[None]:
    """Restore the trainer's state after the block, in which it may compute losses.

    Trainers store metrics, counters, logs and generated text in attributes whose names vary by
    class and version. So we name none of them: inside the block each attribute that holds a
    container holds a copy of it, and afterwards all attributes are restored.
    """
    # The accelerator is included because it keeps a list of all data loaders it has prepared.
    owners = (trainer, trainer.state, trainer.accelerator, trainer.accelerator.gradient_state)
    with restored(map(vars, owners)):
        for owner in owners:
            vars(owner).update({name: _copied(value) for name, value in vars(owner).items()})
        yield


def _copied(value: object) -> object:
    """A copy of nested containers that shares tensors and models, which stay unchanged."""
    # Exact types only, because a subclass may have more state than its items.
    if type(value) not in (dict, defaultdict, OrderedDict, list, deque, set):
        return value
    copied = copy.copy(value)
    if isinstance(copied, dict):
        copied.update({key: _copied(held) for key, held in copied.items()})
    elif isinstance(copied, (list, deque)):
        for index, held in enumerate(copied):
            copied[index] = _copied(held)
    return copied
