# SPDX-License-Identifier: Apache-2.0
"""What a trainer keeps between steps: metrics, buffers, counters. Put aside, and given back.

Trainers note something in every loss (running averages, completions that they will use again,
tokens seen). Which names they use differs from one to the next, so everything is kept that is plain
data.
"""

import contextlib
import copy
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from transformers import Trainer

_DATA = ("train_dataset", "eval_dataset")  # read only, and large where they are plain lists
_PLAIN = (type(None), bool, int, float, complex, str, bytes, Tensor, np.ndarray, np.generic)


@contextlib.contextmanager
def unchanged(trainer: Trainer) -> Iterator[None]:
    """Give the trainer back with the attributes, metrics, buffers and data loaders that it had.

    Inside the block a batch stands for one step of its own: nothing is accumulated, and a trainer
    that samples completions samples them for each batch, with the model as it is then.
    """
    holders = (trainer, trainer.state)
    before = [(holder, dict(vars(holder)), _contents(holder)) for holder in holders]
    num_loaders = len(trainer.accelerator._dataloaders)
    trainer.current_gradient_accumulation_steps = 1  # there only once a trainer has trained
    if is_buffering(trainer):
        trainer._buffered_inputs = None
        trainer._step = 0  # from any other step on it would use the same completions again
    try:
        yield
    finally:
        for holder, attributes, contents in before:
            for name in vars(holder).keys() - attributes.keys():
                delattr(holder, name)
            vars(holder).update(attributes | contents)
        del trainer.accelerator._dataloaders[num_loaders:]


def is_buffering(trainer: Trainer) -> bool:
    """Whether the trainer samples completions and keeps them over several steps."""
    return "_buffered_inputs" in vars(trainer)


def num_repeats(trainer: Trainer) -> int:
    """How many times in a row a trainer's loader gives the same prompts; 1 for most."""
    if not is_buffering(trainer):
        return 1
    return int(trainer.num_iterations * trainer.args.steps_per_generation)


def _contents(holder: Any) -> dict[str, Any]:
    """Copies of the attributes that can change inside: containers of plain data."""
    return {
        name: copy.deepcopy(value)
        for name, value in vars(holder).items()
        if name not in _DATA and not isinstance(value, _PLAIN) and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_plain(key) and _is_plain(one) for key, one in value.items())
    if isinstance(value, (list, tuple, set, deque)):
        return all(_is_plain(one) for one in value)
    return isinstance(value, _PLAIN)
