# SPDX-License-Identifier: Apache-2.0
"""Elimination: path-integrated gate gradients under a budget that shrinks round by round.

    A_0 = all modules
    s_i^r = -∫_0^1 ∂L/∂γ_i (γ = t on A_r, 0 elsewhere) dt      for i in A_r, else 0
    A_r+1 = A_r without its lowest scores (a share `1 - keep_fraction` of it)
    s_i = mean over rounds of s_i^r

This keeps the hard budget on the mask, `‖γ‖ < H` in the definition of importance, and lowers it
step by step. Rank-one parts differ in size, so a round closes those with the lowest score per
parameter. A round closes one of two modules that can replace each other for good, and the other
then carries what both did. The record keeps each round's sum of scores: an estimate, in nats, of
what the remaining modules achieve together. Each batch is taken at its own point of the integral,
so a sum has the noise of single batches, about 15 % in the demo; `keylayers verify` measures what
the best modules carry.

Source: keylayers. A round scores like `path`; the rounds are recursive feature elimination: Guyon,
    Weston, Barnhill, Vapnik: "Gene Selection for Cancer Classification using Support Vector
    Machines", Machine Learning 46, 2002.
Differs: nothing is retrained between rounds; the score is the mean over rounds, which breaks ties
    inside a round and is in nats.
Cost: rounds x `mask_batches` forward and backward passes for activations; the number of rounds
    grows with the logarithm of the number of modules (56 modules: 8 rounds, 224 modules: 12).
Blind to: what a module would add to sets other than the best ones. Standard errors treat the
    rounds' sets as given and their batches as independent, which they are not with few examples;
    they overstate the noise inside a round, because the slope changes between the points.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from keylayers.gates import gate_groups
from keylayers.scores.options import EliminationOptions
from keylayers.scores.path import gauss_legendre
from keylayers.scores.task import ModuleScores, Task, mean_and_error


def elimination(task: Task, options: EliminationOptions) -> ModuleScores:
    """The mean share of each update's module in what the sets that hold it achieve, in nats."""
    num_gates = len(gate_groups(task.updates, options.granularity))
    sizes, num_batches = options.round_sizes(num_gates), options.mask_batches
    points = gauss_legendre(num_batches)
    with task.masked(num_batches * len(sizes), granularity=options.granularity) as masked:
        scores = total = torch.zeros(num_gates, dtype=torch.float64)
        variance = torch.zeros_like(total)
        rounds = []
        is_open = torch.ones(num_gates)
        batches = iter(masked.batches)
        for size in sizes:
            is_open = best(scores / masked.costs, is_open, size)
            # One pass per batch, each at its own point: only the mean of the shares estimates the
            # integral, so their spread overstates the error of the mean.
            shares = [
                -weight * num_batches * masked.gradient(point * is_open, next(batches)) * is_open
                for point, weight in points
            ]
            scores, error = mean_and_error(torch.stack(shares).double())
            total = total + scores / len(sizes)
            if error is not None:
                variance += (error / len(sizes)).square()
            rounds.append({"num_modules": size, "loss_reduction_nats": float(scores.sum())})
        return masked.result(
            total,
            unit=masked.loss_unit,
            standard_errors=variance.sqrt() if num_batches > 1 else None,
            findings={"rounds": rounds},
        )


def best(
    scores: Float[Tensor, " gate"], is_open: Float[Tensor, " gate"], size: int
) -> Float[Tensor, " gate"]:
    """1 for the `size` best of the open gates, 0 for the others; ties in the gates' order."""
    ordered = sorted(is_open.nonzero().flatten().tolist(), key=lambda gate: -float(scores[gate]))
    best = torch.zeros_like(is_open)
    best[ordered[:size]] = 1.0
    return best
