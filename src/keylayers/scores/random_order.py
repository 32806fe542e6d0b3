# SPDX-License-Identifier: Apache-2.0
"""Random order: the control for every method.

    s_i ~ U(0, 1)

Source: the usual control; the paper of ILA compares with random layers too (from memory of it).
Differs: nothing.
Cost: none.
Blind to: everything.
"""

import random

from keylayers.scores.module_scores import ModuleScores
from keylayers.scores.options import MethodOptions
from keylayers.scores.task import Task


def random_order(task: Task, options: MethodOptions) -> ModuleScores:
    """A random number for each update's module, by the task's seed."""
    generator = random.Random(f"random order {task.seed}")
    return task.result([generator.random() for _ in task.updates], unit="a random number")
