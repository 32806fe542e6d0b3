# SPDX-License-Identifier: Apache-2.0
"""KappaTune: train the weights with the lowest condition number.

    s_i = -σ_max(W_i) / (σ_min(W_i) + 1e-8)

Source: KappaTune as in PEFT (`peft.find_kappa_target_modules`): condition numbers of the base
    weights, the lowest first.
Differs: nothing in the score; negated, because higher means more important here.
Cost: no pass; one singular value decomposition per module.
Blind to: data and update. The score depends on the smallest and largest singular value only.
"""

import torch

from keylayers.model.weights import base_weight
from keylayers.scores.options import MethodOptions
from keylayers.scores.task import ModuleScores, Task


def kappatune(task: Task, options: MethodOptions) -> ModuleScores:
    """Minus the condition number of each update's base weight."""
    scores = []
    for update in task.updates:
        sigma = torch.linalg.svdvals(base_weight(update.layer))
        scores.append(-float(sigma[0] / (sigma[-1] + 1e-8)))
    return task.result(scores, unit="minus the condition number")
