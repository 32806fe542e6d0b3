# SPDX-License-Identifier: Apache-2.0
"""Depth: the first, last or middle blocks, the customs that a ranking must beat.

    first: s_i = -block      last: s_i = block      middle: s_i = -|block - (num_blocks - 1) / 2|

Source: common practice (freeze the first n blocks, train the last n); the paper of ILA compares
    with the first and last layers (from memory of it).
Differs: nothing. The modules of a block share a score; ties go by the model's order.
Cost: none.
Blind to: data, update and weights.
"""

from collections.abc import Callable

from keylayers.scores.module_scores import ModuleScores, block_indices
from keylayers.scores.options import MethodOptions
from keylayers.scores.task import Task


def first(task: Task, options: MethodOptions) -> ModuleScores:
    """Higher the nearer a module's block is to the embeddings."""
    return _by_block(task, lambda block, num_blocks: -float(block))


def last(task: Task, options: MethodOptions) -> ModuleScores:
    """Higher the nearer a module's block is to the output."""
    return _by_block(task, lambda block, num_blocks: float(block))


def middle(task: Task, options: MethodOptions) -> ModuleScores:
    """Higher the nearer a module's block is to the middle of the network."""
    return _by_block(task, lambda block, num_blocks: -abs(block - (num_blocks - 1) / 2))


def _by_block(task: Task, score: Callable[[int, int], float]) -> ModuleScores:
    blocks = block_indices(task.updates)
    return task.result([score(block, max(blocks) + 1) for block in blocks], unit="blocks")
