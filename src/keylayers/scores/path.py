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
Cost: points x batches forward and backward passes for activations; scores are not trained.
Blind to: what happens off the diagonal, where some gates are open and others closed. Modules that
    can stand in for each other share the credit.
"""

import time
from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Trainer, set_seed

from keylayers.gates import Gates, gated
from keylayers.mask.module_scores import ModuleScores, to_modules
from keylayers.mask.trainer_loss import TrainerLoss
from keylayers.options import MaskOptions
from keylayers.progress import OnStep
from keylayers.updates import Update


def path(
    trainer: Trainer,
    updates: Sequence[Update],
    options: MaskOptions,
    on_step: OnStep | None = None,
) -> ModuleScores:
    """The share of each update's module in the loss reduction of the fine-tune, in nats.

    Args:
        trainer: Any transformers or TRL trainer; its model carries the updates.
        updates: From `lora_updates` or `dense_updates`.
        options: `path_points` and `path_batches` decide the cost.
        on_step: Called after each pass with its number, from 1, and its loss in nats.

    Raises:
        LossError: the loss became NaN or infinite.
        GuardError: something else than the gates changed, or a gate took no part.
    """
    start = time.perf_counter()
    source = TrainerLoss(trainer)
    nodes, weights = np.polynomial.legendre.leggauss(options.path_points)
    shares: list[Float[Tensor, " gate"]] = []  # one a batch
    losses: list[float] = []
    with (
        gated(
            trainer.model,
            updates,
            initial_score=0.0,
            granularity=options.granularity,
            link="identity",
        ) as gates,
        source.quiet(),
    ):
        set_seed(trainer.args.seed if options.mask_seed is None else options.mask_seed)
        batches = list(islice(source.batches(), options.path_batches))
        for batch in batches:
            share = torch.zeros(len(gates), dtype=gates.scores().dtype)
            for node, weight in zip(nodes, weights, strict=True):
                _open(gates, (node + 1) / 2)
                losses.append(source.backward(dict(batch), step=len(losses) + 1))
                share -= float(weight) / 2 * gates.gradient()
                for parameter in gates.parameters():
                    parameter.grad = None
                if on_step is not None:
                    on_step(len(losses), losses[-1])
            shares.append(share)
        ends = []
        for value in (0.0, 1.0):
            _open(gates, value)
            with torch.no_grad():
                ends.append(
                    sum(float(source.loss(dict(batch))) for batch in batches) / len(batches)
                )
        mean, error = _mean_and_error(torch.stack(shares))
        scores = to_modules(gates, mean, updates)
        errors = None if error is None else tuple(to_modules(gates, error, updates))
    return ModuleScores(
        module_names=tuple(update.module.name for update in updates),
        scores=tuple(scores),
        standard_errors=errors,
        unit="nats per token",
        losses=tuple(losses),
        seconds=time.perf_counter() - start,
        findings={
            "sum_of_scores_nats": float(mean.sum()),
            "loss_reduction_nats": ends[0] - ends[1],
        },
    )


def _open(gates: Gates, value: float) -> None:
    """Open all gates to the same value."""
    gates.set_scores(torch.full((len(gates),), value))


def _mean_and_error(
    shares: Float[Tensor, "batch gate"],
) -> tuple[Float[Tensor, " gate"], Float[Tensor, " gate"] | None]:
    """Mean over batches and its standard error; no error from a single batch."""
    if len(shares) < 2:
        return shares.mean(dim=0), None
    return shares.mean(dim=0), shares.std(dim=0) / len(shares) ** 0.5
