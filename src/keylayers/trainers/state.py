# SPDX-License-Identifier: Apache-2.0
"""Work with somebody else's trainer and give it back exactly as it was.

Trainers keep metrics, counters, logs and buffers of generated text, each under a name of its own.
None of the names is known here: for the length of a block every attribute that holds a list, a
dictionary or a queue holds a copy, and afterwards every attribute is what it was.
"""

import contextlib
import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator

from transformers import Trainer


@contextlib.contextmanager
def unchanged_trainer(trainer: Trainer) -> Iterator[None]:
    """Inside the block the trainer may compute losses; afterwards its state is as it was.

    That of its accelerator too, to which every data loader is made known.
    """
    owners = (trainer, trainer.state, trainer.accelerator, trainer.accelerator.gradient_state)
    with contextlib.ExitStack() as stack:
        for owner in owners:
            stack.enter_context(_unchanged_attributes(owner))
        yield


@contextlib.contextmanager
def _unchanged_attributes(owner: object) -> Iterator[None]:
    attributes = vars(owner)
    before = dict(attributes)
    for name, value in before.items():
        attributes[name] = _copied(value)
    try:
        yield
    finally:
        attributes.clear()
        attributes.update(before)


def _copied(value: object) -> object:
    """The containers copied, what they hold shared: nothing changes a tensor or a model in place.

    Exact types only, since a subclass may hold more than it shows.
    """
    if type(value) in (dict, defaultdict, OrderedDict):
        assert isinstance(value, dict)
        copied = copy.copy(value)
        for key, held in value.items():
            copied[key] = _copied(held)
        return copied
    if type(value) in (list, deque):
        assert isinstance(value, (list, deque))
        held = [_copied(one) for one in value]
        return deque(held, value.maxlen) if isinstance(value, deque) else held
    return set(value) if type(value) is set else value
