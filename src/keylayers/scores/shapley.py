# SPDX-License-Identifier: Apache-2.0
"""Shapley values by sampling: the mean gain of a module over random orders of adding it.

    s_i = mean over random orders of  L(those before i) - L(those before i and i)

Scores are in nats and sum to the loss reduction of the fine-tune exactly, for any number of
orders.

Source: Castro, Gómez, Tejada: "Polynomial calculation of the Shapley value based on sampling",
    Computers & Operations Research 36, 2009.
Differs: each order takes the next batch, so that noise of orders and of batches averages out
    together.
Cost: `permutations` x (modules + 1) forward passes.
Blind to: nothing but its noise, which falls with the square root of the cost.
"""

import torch

from keylayers.scores.options import ShapleyOptions
from keylayers.scores.task import ModuleScores, Task


def shapley(task: Task, options: ShapleyOptions) -> ModuleScores:
    """The sampled Shapley value of each update, in nats of loss reduction."""
    with task.masked(options.mask_batches, granularity=options.granularity) as masked:
        num_gates = len(masked.gates)
        gains = torch.zeros(options.permutations, num_gates)
        for row in range(options.permutations):
            batch = masked.batches[row % len(masked.batches)]
            values = torch.zeros(num_gates)
            before = masked.loss(values, batch)
            for index in torch.randperm(num_gates).tolist():
                values[index] = 1.0
                after = masked.loss(values, batch)
                gains[row, index] = before - after
                before = after
        return masked.mean(gains, unit=masked.loss_unit)
