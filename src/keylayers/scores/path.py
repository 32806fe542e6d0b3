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

import torch

from keylayers.scores.module_scores import ModuleScores
from keylayers.scores.options import PathOptions
from keylayers.scores.path_integral import path_shares
from keylayers.scores.task import Task, mean_and_error


def path(task: Task, options: PathOptions) -> ModuleScores:
    """The share of each update's module in the loss reduction of the fine-tune, in nats."""
    with task.masked(options.mask_batches, granularity=options.granularity) as masked:
        all_open = torch.ones(len(masked.gates))
        shares = path_shares(masked, masked.batches, all_open, options.path_points)
        mean, error = mean_and_error(shares)
        findings = {"sum_of_scores_nats": float(mean.sum())}
        if masked.compares_losses:
            reduction = (masked.losses(0.0) - masked.losses(1.0)).mean()
            findings["loss_reduction_nats"] = float(reduction)
        return masked.result(mean, unit=masked.loss_unit, standard_errors=error, findings=findings)
