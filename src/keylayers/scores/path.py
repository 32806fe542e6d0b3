# SPDX-License-Identifier: Apache-2.0
"""Path-integrated gate gradient: what each update adds to the loss reduction of the fine-tune.

    s_i = - ∫_0^1 ∂L/∂γ_i (γ = t·1) dt        Σ_i s_i = L(θ_0) - L(θ_0 + Δθ)

All gates open together from 0 to 1, and each module gets its share of the slope on the way. Scores
are in nats and sum to the whole loss reduction (completeness). The record holds both sides on the
same batches; their difference is the error of the integration.

Source: Aumann and Shapley, "Values of Non-Atomic Games", 1974; for the inputs of a network:
    Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", ICML 2017,
    arXiv:1703.01365, equation 1.
Differs: the path runs over gates on a fine-tune's update instead of over inputs. The integral is
    taken at Gauss-Legendre points, all on the same batches.
Cost: `path_points` x `mask_batches` forward and backward passes for activations, and two forward
    passes a batch for the check; scores are not trained.
Blind to: what happens off the diagonal, where some gates are open and others closed. Modules that
    can replace each other share the credit.
"""

from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from keylayers.scores.options import PathOptions
from keylayers.scores.task import MaskedModel, ModuleScores, Task, mean_and_error
from keylayers.trainers.data import samples


def path(task: Task, options: PathOptions) -> ModuleScores:
    """The share of each update's module in the loss reduction of the fine-tune, in nats."""
    with task.masked(options.mask_batches, granularity=options.granularity) as masked:
        mean, error = mean_and_error(path_shares(masked, options.path_points))
        findings = {"sum_of_scores_nats": float(mean.sum())}
        if not samples(task.trainer):  # losses of two masks can be compared
            reduction = (masked.losses(0.0) - masked.losses(1.0)).mean()
            findings["loss_reduction_nats"] = float(reduction)
        return masked.result(mean, unit=masked.loss_unit, standard_errors=error, findings=findings)


def path_shares(masked: MaskedModel, num_points: int) -> Float[Tensor, "batch gate"]:
    """Each gate's share of the loss reduction from no update to all, in nats, batch by batch."""
    shares = torch.zeros(len(masked.batches), len(masked.gates), dtype=torch.float64)
    for row, batch in zip(shares, masked.batches, strict=True):
        for point, weight in gauss_legendre(num_points):
            row -= weight * masked.gradient(point, batch)
    return shares


@cache
def gauss_legendre(num_points: int) -> tuple[tuple[float, float], ...]:
    """Points in (0, 1) and their weights; n of them are exact for polynomials of degree 2n - 1."""
    points, weights = np.polynomial.legendre.leggauss(num_points)
    return tuple(zip(((points + 1) / 2).tolist(), (weights / 2).tolist(), strict=True))
