# SPDX-License-Identifier: Apache-2.0
"""Random order: the control that every method is held against.

    s_i ~ U(0, 1)

Source: the usual control; the paper of ILA compares with random layers too (from memory of it).
Differs: nothing.
Cost: none.
Blind to: everything.
"""

import random
from collections.abc import Sequence

from transformers import Trainer

from keylayers.options import MaskOptions
from keylayers.progress import OnStep
from keylayers.scores.module_scores import ModuleScores, data_free
from keylayers.updates import Update


def random_order(
    trainer: Trainer,
    updates: Sequence[Update],
    options: MaskOptions,
    on_step: OnStep | None = None,
) -> ModuleScores:
    """A random number for each update's module, from `mask_seed`, else from the trainer's seed."""
    seed = trainer.args.seed if options.mask_seed is None else options.mask_seed
    generator = random.Random(f"random order {seed}")
    values = [generator.random() for _ in updates]
    return data_free(updates, values, unit="a random number", seconds=0.0)
