# SPDX-License-Identifier: Apache-2.0
"""Spectrum: signal-to-noise ratio of the base model's weights, within each kind of module.

    SNR_i = Σ{σ > ε} σ / Σ{σ ≤ ε} σ / σ_max,   ε = (IQR(σ) / 1.349) · (1 + √β),   β = min / max of d
    s_i = share of the modules of its kind with an SNR of at most SNR_i

Source: Hartford, Atkins, Neto, Golchinfar: "Spectrum: Targeted Training on Signal to Noise Ratio",
    2024, arXiv:2406.06623; threshold and selection as in its code (QuixiAI/spectrum), read, not
    copied: the code leaves out a factor √n of the paper's Marchenko-Pastur bound.
Differs: its share is taken inside each kind of module, so the score is the rank inside the kind; a
    budget over all modules then takes nearly the same share of each. SNR without noise below the
    threshold is infinite there and ranks first here.
Cost: no pass; one singular value decomposition a module.
Blind to: data and update.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from keylayers.scores.module_scores import ModuleScores
from keylayers.scores.options import MethodOptions
from keylayers.scores.task import Task
from keylayers.updates.base_weight import base_weight


def spectrum(task: Task, options: MethodOptions) -> ModuleScores:
    """The place of each update's module by signal-to-noise ratio in its projection, in (0, 1]."""
    ratios = [signal_to_noise(base_weight(update.layer)) for update in task.updates]
    kinds = [update.module.projection for update in task.updates]
    return task.result(shares_of_kind(ratios, kinds), unit="share of its kind")


def shares_of_kind(ratios: Sequence[float], kinds: Sequence[str]) -> list[float]:
    """For each module the share of its kind with a ratio of at most its own."""
    values = []
    for ratio, kind in zip(ratios, kinds, strict=True):
        of_kind = [other for other, its in zip(ratios, kinds, strict=True) if its == kind]
        values.append(sum(other <= ratio for other in of_kind) / len(of_kind))
    return values


def signal_to_noise(weight: Float[Tensor, "d_out d_in"]) -> float:
    """Sum of singular values above the noise threshold over that below, divided by the largest."""
    sigma = torch.linalg.svdvals(weight)
    quartiles = torch.quantile(sigma, sigma.new_tensor([0.25, 0.75]))
    noise = float(quartiles[1] - quartiles[0]) / 1.349
    beta = min(weight.shape) / max(weight.shape)
    is_signal = sigma > noise * (1 + math.sqrt(beta))
    below = float(sigma[~is_signal].sum())
    return math.inf if below == 0 else float(sigma[is_signal].sum()) / below / float(sigma[0])
