# SPDX-License-Identifier: Apache-2.0
"""Fisher pruning of updates: what closing each gate costs, to second order, in rounds.

    A_0 = all gates
    f_i = Σ_examples (∂L_example/∂γ_i)²      mean over γ = t on A_r, t from 1/2 to 1
    g_i = -∂L/∂γ_i                           mean over the same points
    s_i^r = f_i / Σ f + (1 - c_r)^10 · g_i / Σ |g|      c_r = cost of A_r / cost of A_0
    A_r+1 = A_r without its lowest scores per cost (a share `1 - keep_fraction` of it)
    s_i = cost of i · (rounds that i survived + its place among the s_i^r / cost of its last round)

Half of f is the rise of the loss when a gate closes alone (optimal brain damage with the empirical
Fisher matrix). It decides while nearly everything is open: the signed gradient is noise there,
since a trained update is near a minimum. Once most is closed the loss has a slope, and the signed
gradient says what is missed most.

Source: Theis, Korshunova, Tejani, Huszár: "Faster gaze prediction with dense networks and Fisher
    pruning", 2018, arXiv:1801.05787, equation 5; LeCun, Denker, Solla: "Optimal brain damage",
    1989.
Differs: gates are on what a fine-tune added, not on channels; derivatives are means over the upper
    half of the path to γ = 1 instead of at its end; the signed term; nothing is retrained.
Cost: rounds x `mask_batches` forward and backward passes for activations, as `elimination`.
Blind to: how gates act together inside a round. An example is a row of the batch: rows that pack
    several examples make f too small, and the two answers of a preference pair count as two.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from keylayers.gates import gate_groups
from keylayers.scores.elimination import best
from keylayers.scores.options import EliminationOptions
from keylayers.scores.path import gauss_legendre
from keylayers.scores.task import ModuleScores, Task
from keylayers.trainers.data import num_labels

SIGNED_POWER = 10  # experiments/LOG.md, "which score for the rank-one parts"


def fisher_pruning(task: Task, options: EliminationOptions) -> ModuleScores:
    """The order in which gates close: the later, the more important."""
    num_gates = len(gate_groups(task.updates, options.granularity))
    sizes, num_batches = options.round_sizes(num_gates), options.mask_batches
    points = [((1 + point) / 2, weight) for point, weight in gauss_legendre(num_batches)]
    with task.masked(
        num_batches * len(sizes), granularity=options.granularity, looks_inside=True
    ) as masked:
        costs = masked.costs
        scores = total = torch.zeros(num_gates, dtype=torch.float64)
        is_open = torch.ones(num_gates)
        batches = iter(masked.batches)
        for round_index, size in enumerate(sizes):
            is_open = best(scores / costs, is_open, size)
            signed = squared = torch.zeros(num_gates, dtype=torch.float64)
            for point, weight in points:
                batch = next(batches)
                gradient, squares = masked.gradient_by_example(point * is_open, batch)
                signed = signed - weight * gradient * is_open
                squared = squared + weight * num_labels(batch) * squares * is_open
            share = float((is_open * costs).sum() / costs.sum())
            scores = _relative(squared) + (1 - share) ** SIGNED_POWER * _relative(signed)
            place = (scores / costs).argsort(stable=True).argsort()  # in the round, worst first
            # A zero update ties with others like it, whatever round it was closed in.
            is_new = (is_open > 0) & (scores != 0)
            total = torch.where(is_new, round_index + (1 + place) / num_gates, total)
        is_of_parts = options.granularity == "part"
        return masked.result(
            total * costs, unit="rounds survived" + (" x parameters" if is_of_parts else "")
        )


def _relative(values: Float[Tensor, " gate"]) -> Float[Tensor, " gate"]:
    """The values divided by the sum of their sizes."""
    return values / values.abs().sum().clamp(min=torch.finfo(values.dtype).tiny)
