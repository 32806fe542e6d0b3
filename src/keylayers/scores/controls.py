# SPDX-License-Identifier: Apache-2.0
"""Controls: the first, last or middle blocks, and a random order, which a ranking must beat.

    first: s_i = -block      last: s_i = block      middle: s_i = -|block - (num_blocks - 1) / 2|
    random: s_i ~ U(0, 1)

Source: common practice (freeze the first n blocks, train the last n); the paper of ILA compares
    with the first, the last and random layers (from memory of it).
Differs: nothing. The modules of a block share a score; ties go by the model's order.
Cost: none.
Blind to: data, update and weights.
"""

import random

from keylayers.scores.options import MethodOptions
from keylayers.scores.task import ModuleScores, Task


def first(task: Task, options: MethodOptions) -> ModuleScores:
    """Higher the nearer a module's block is to the embeddings."""
    return task.result([-float(block) for block in task.blocks()], unit="blocks")


def last(task: Task, options: MethodOptions) -> ModuleScores:
    """Higher the nearer a module's block is to the output."""
    return task.result([float(block) for block in task.blocks()], unit="blocks")


def middle(task: Task, options: MethodOptions) -> ModuleScores:
    """Higher the nearer a module's block is to the middle of the network."""
    blocks = task.blocks()
    return task.result([-abs(block - max(blocks) / 2) for block in blocks], unit="blocks")


def random_order(task: Task, options: MethodOptions) -> ModuleScores:
    """A random number for each update's module, by the task's seed."""
    generator = random.Random(f"random order {task.seed}")
    return task.result([generator.random() for _ in task.updates], unit="a random number")
