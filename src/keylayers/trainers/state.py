# SPDX-License-Identifier: Apache-2.0
"""Use a trainer without changing its state.

Trainers store metrics, counters, logs and generated text in attributes whose names vary by class
and version. So we name none of them: inside a block each attribute that holds a container holds a
copy of it, and afterwards all attributes are restored.
"""

import contextlib
import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator

from transformers import Trainer


@contextlib.contextmanager
def unchanged_trainer(trainer: Trainer) -> Iterator[None]:
    """Restore the trainer's state after the block, in which it may compute losses."""
    # The accelerator is included because it keeps a list of all data loaders it has prepared.
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
    """A copy of nested containers that shares tensors and models, which stay unchanged.

    Exact types only, because a subclass may have more state than its items.
    """
    if type(value) in (dict, defaultdict, OrderedDict):
        assert isinstance(value, dict)
        copied = copy.copy(value)
        for key, held in value.items():
            copied[key] = _copied(held)
        return copied
    if type(value) in (list, deque):
        assert isinstance(value, (list, deque))
        held = [_copied(item) for item in value]
        return deque(held, value.maxlen) if isinstance(value, deque) else held
    return set(value) if type(value) is set else value
