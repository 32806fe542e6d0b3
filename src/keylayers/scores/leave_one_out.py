# SPDX-License-Identifier: Apache-2.0
"""Leave-one-out: how much the loss rises when one update is removed.

    s_i = L(all updates but i) - L(all updates)

Source: the direct ablation; in pruning, Mozer, Smolensky: "Skeletonization", NeurIPS 1988.
Differs: nothing.
Cost: (modules + 1) x `mask_batches` forward passes.
Blind to: modules that can replace each other, since removing either alone costs nothing; and
    everything away from the full update.
"""

import torch

from keylayers.scores.options import GroupedBatches
from keylayers.scores.task import ModuleScores, Task


def leave_one_out(task: Task, options: GroupedBatches) -> ModuleScores:
    """How much the loss rises without each update, in nats."""
    with task.masked(options.mask_batches, granularity=options.granularity) as masked:
        with_all = masked.losses(1.0)
        rises = []
        for index in range(len(masked.gates)):
            values = torch.ones(len(masked.gates))
            values[index] = 0.0
            rises.append(masked.losses(values) - with_all)
        return masked.mean(torch.stack(rises, dim=1), unit=masked.loss_unit)
