# SPDX-License-Identifier: Apache-2.0
"""Path-integrated gate gradient: what each update adds to the loss reduction of the fine-tune.

    s_i = - ∫_0^1 ∂L/∂γ_i (γ = t·1) dt        Σ_i s_i = L(θ_0) - L(θ_0 + Δθ)

All gates open together from none to all, and each is paid its share of the slope on the way. Scores
are in nats and sum to the whole loss reduction (completeness); the record holds both sides on the
same batches, and their difference is the error of the integration.

Source: Aumann and Shapley, "Values of Non-Atomic Games", 1974; for the inputs of a network:
    Sundararajan, Taly, Yan, "Axiomatic Attribution for Deep Networks", ICML 2017,
    arXiv:1703.01365, equation 1.
Differs: the path runs over gates on a fine-tune's update instead of over inputs. The integral is
    taken at Gauss-Legendre points, all on the same batches.
Cost: `path_points` x `mask_batches` forward and backward passes for activations, and two forward
    passes a batch for the check; scores are not trained.
Blind to: what happens off the diagonal, where some gates are open and others closed. Modules that
    can stand in for each other share the credit.
"""

from collections.abc import Sequence

import torch
from transformers import Trainer

from keylayers.options import MaskOptions
from keylayers.progress import OnStep
from keylayers.scores.module_scores import ModuleScores
from keylayers.scores.path_integral import path_shares
from keylayers.scores.scoring import mean_and_error, scoring
from keylayers.updates import Update


def path(
    trainer: Trainer,
    updates: Sequence[Update],
    options: MaskOptions,
    on_step: OnStep | None = None,
) -> ModuleScores:
    """The share of each update's module in the loss reduction of the fine-tune, in nats.

    Raises:
        LossError: the loss became NaN or infinite.
        GuardError: something else than the gates changed, or a gate took no part.
    """
    with scoring(trainer, updates, options, on_step) as task:
        all_open = torch.ones(len(task.gates))
        mean, error = mean_and_error(path_shares(task, task.batches, all_open, options.path_points))
        findings = {"sum_of_scores_nats": float(mean.sum())}
        if task.compares_losses:
            reduction = (task.losses(0.0) - task.losses(1.0)).mean()
            findings["loss_reduction_nats"] = float(reduction)
        return task.result(mean, unit=task.loss_unit, standard_errors=error, findings=findings)
