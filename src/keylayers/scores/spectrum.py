# SPDX-License-Identifier: Apache-2.0
"""Spectrum: signal-to-noise ratio of the base model's weights, within each projection.

    SNR_i = Σ{σ > ε} σ / Σ{σ ≤ ε} σ / σ_max,   ε = (IQR(σ) / 1.349) · (1 + √β),   β = min / max of d
    s_i = share of the modules of its projection with an SNR of at most SNR_i

Source: Hartford, Atkins, Neto, Golchinfar: "Spectrum: Targeted Training on Signal to Noise Ratio",
    2024, arXiv:2406.06623; threshold and selection as in its code (QuixiAI/spectrum), read, not
    copied: the code leaves out a factor √n of the paper's Marchenko-Pastur bound.
Differs: Spectrum selects a share of each projection, so the score is the rank inside it; a budget
    over all modules then takes nearly the same share of each. Without noise below the
    threshold the SNR is infinite in its code, and first here.
Cost: no pass; one singular value decomposition per module.
Blind to: data and update.
"""

import math
from collections.abc import Sequence

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from keylayers.model.weights import base_weight
from keylayers.scores.options import MethodOptions
from keylayers.scores.task import ModuleScores, Task


def spectrum(task: Task, options: MethodOptions) -> ModuleScores:
    """The place of each update's module by signal-to-noise ratio in its projection, in (0, 1]."""
    ratios = [signal_to_noise(base_weight(update.layer)) for update in task.updates]
    projections = [update.module.projection for update in task.updates]
    return task.result(shares_of_kind(ratios, projections), unit="share of its kind")


def shares_of_kind(ratios: Sequence[float], projections: Sequence[str]) -> list[float]:
    """For each module the share of its projection's modules with a ratio of at most its own."""
    return list(pd.Series(ratios).groupby(list(projections)).rank(method="max", pct=True))


def signal_to_noise(weight: Float[Tensor, "d_out d_in"]) -> float:
    """Sum of singular values above the noise threshold over that below, divided by the largest."""
    sigma = torch.linalg.svdvals(weight)
    quartiles = torch.quantile(sigma, sigma.new_tensor([0.25, 0.75]))
    noise = float(quartiles[1] - quartiles[0]) / 1.349
    beta = min(weight.shape) / max(weight.shape)
    is_signal = sigma > noise * (1 + math.sqrt(beta))
    below = float(sigma[~is_signal].sum())
    return math.inf if below == 0 else float(sigma[is_signal].sum()) / below / float(sigma[0])
