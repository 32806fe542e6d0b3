# SPDX-License-Identifier: Apache-2.0
"""Keep an adapter frozen while its model switches adapters.

PEFT 0.21 sets `requires_grad` on each adapter that it activates, even one that was loaded frozen
(https://github.com/huggingface/peft/issues/3447). Trainers with a reference (DPO, KTO, GRPO) switch
to a second adapter, or to none, and back in every loss. Without this file the second loss would
compute gradients of all LoRA weights, and under gradient checkpointing a recomputed activation
would not match the first.
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
    """Inside the block, switching adapters unfreezes no weight that was frozen at its start.

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
