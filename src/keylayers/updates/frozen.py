# SPDX-License-Identifier: Apache-2.0
"""Keep an adapter frozen while its model switches adapters.

PEFT takes an adapter that is switched on for one to be trained: it thaws the weights. Trainers with
a reference (DPO, KTO, GRPO) switch in the middle of every loss, to a second adapter or to none and
back. Without this the second loss would already compute the gradients of all LoRA weights, and a
recomputed activation would not match its first version under gradient checkpointing.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

SWITCHES = ("set_adapter", "enable_adapters", "set_requires_grad")


@contextlib.contextmanager
def kept_frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block no switch of adapters thaws a weight that was frozen when it began.

    Hooks on PEFT's public methods of each layer; a layer that has no adapter is left alone.
    """
    layers = [
        module
        for module in model.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
    ]
    for layer in layers:
        frozen = [one for one in layer.parameters() if not one.requires_grad]
        for name in SWITCHES:
            setattr(layer, name, partial(_switch_and_freeze, getattr(layer, name), frozen))
    try:
        yield
    finally:
        for layer in layers:
            for name in SWITCHES:
                delattr(layer, name)  # the class's own method is behind it


def _switch_and_freeze(
    switch: Callable[..., None], frozen: list[nn.Parameter], *args: Any, **named: Any
) -> None:
    switch(*args, **named)
    for parameter in frozen:
        parameter.requires_grad_(False)
