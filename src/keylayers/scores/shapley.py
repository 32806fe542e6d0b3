# SPDX-License-Identifier: Apache-2.0
"""Shapley values by sampling: the mean gain of a module over random orders of adding it.

    s_i = mean over random orders of  L(those before i) - L(those before i and i)

Scores are in nats and sum to the loss reduction of the fine-tune exactly, for any number of
orders.

Source: Castro, Gómez, Tejada: "Polynomial calculation of the Shapley value based on sampling",
    Computers & Operations Research 36, 2009.
Differs: batches are gone through in turn, one for each order, so that the noise of orders and of
    batches average out together.
Cost: `permutations` x (modules + 1) forward passes.
Blind to: nothing but its own noise, which falls with the square root of the cost.
"""

from collections.abc import Sequence

import torch
from transformers import Trainer

from keylayers.options import MaskOptions
from keylayers.progress import OnStep
from keylayers.scores.module_scores import ModuleScores
from keylayers.scores.scoring import mean_and_error, scoring
from keylayers.updates import Update


def shapley(
    trainer: Trainer,
    updates: Sequence[Update],
    options: MaskOptions,
    on_step: OnStep | None = None,
) -> ModuleScores:
    """The sampled Shapley value of each update, in nats of loss reduction."""
    with scoring(trainer, updates, options, on_step) as task:
        num_gates = len(task.gates)
        gains = torch.zeros(options.permutations, num_gates)
        for row in range(options.permutations):
            batch = task.batches[row % len(task.batches)]
            values = torch.zeros(num_gates)
            before = task.loss(values, batch)
            for index in torch.randperm(num_gates).tolist():
                values[index] = 1.0
                after = task.loss(values, batch)
                gains[row, index] = before - after
                before = after
        mean, error = mean_and_error(gains)
        return task.result(mean, unit=task.loss_unit, standard_errors=error)
