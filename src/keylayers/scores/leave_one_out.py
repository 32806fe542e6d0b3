# SPDX-License-Identifier: Apache-2.0
"""Leave-one-out: what the loss loses when one update is taken away.

    s_i = L(all updates but i) - L(all updates)

Source: the direct ablation; in pruning, Mozer, Smolensky: "Skeletonization", NeurIPS 1988.
Differs: nothing.
Cost: (modules + 1) x `mask_batches` forward passes.
Blind to: modules that can stand in for each other, since each alone can go without loss; and all
    that happens away from the full update.
"""

from collections.abc import Sequence

import torch
from transformers import Trainer

from keylayers.options import MaskOptions
from keylayers.progress import OnStep
from keylayers.scores.module_scores import ModuleScores
from keylayers.scores.scoring import mean_and_error, scoring
from keylayers.updates import Update


def leave_one_out(
    trainer: Trainer,
    updates: Sequence[Update],
    options: MaskOptions,
    on_step: OnStep | None = None,
) -> ModuleScores:
    """The rise of the loss without each update, in nats."""
    with scoring(trainer, updates, options, on_step) as task:
        with_all = task.losses(1.0)
        rises = []
        for index in range(len(task.gates)):
            values = torch.ones(len(task.gates))
            values[index] = 0.0
            rises.append(task.losses(values) - with_all)
        mean, error = mean_and_error(torch.stack(rises, dim=1))
        return task.result(mean, unit=task.loss_unit, standard_errors=error)
