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

from keylayers.model.preserve import restored


@contextlib.contextmanager
def unchanged_trainer(trainer: Trainer) -> Iterator[None]:
    """Restore the trainer's state after the block, in which it may compute losses."""
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
