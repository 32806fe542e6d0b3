# SPDX-License-Identifier: Apache-2.0
"""KappaTune: train the weights with the lowest condition number.

    s_i = -σ_max(W_i) / (σ_min(W_i) + 1e-8)

Source: KappaTune as in PEFT (`peft.find_kappa_target_modules`): condition numbers of the base
    weights, the lowest first.
Differs: nothing in the score; negated, because higher means more important here.
Cost: no pass; one singular value decomposition a module.
Blind to: data and update. Two thin matrices of full rank differ by their smallest singular value
    alone.
"""

import time
from collections.abc import Sequence

import torch
from transformers import Trainer

from keylayers.options import MaskOptions
from keylayers.progress import OnStep
from keylayers.scores.module_scores import ModuleScores, data_free
from keylayers.updates import Update
from keylayers.updates.base_weight import base_weight


def kappatune(
    trainer: Trainer,
    updates: Sequence[Update],
    options: MaskOptions,
    on_step: OnStep | None = None,
) -> ModuleScores:
    """Minus the condition number of each update's base weight."""
    start = time.perf_counter()
    values = []
    for update in updates:
        sigma = torch.linalg.svdvals(base_weight(update.layer))
        values.append(-float(sigma[0] / (sigma[-1] + 1e-8)))
    seconds = time.perf_counter() - start
    return data_free(updates, values, unit="minus the condition number", seconds=seconds)
