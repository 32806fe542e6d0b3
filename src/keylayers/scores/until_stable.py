# SPDX-License-Identifier: Apache-2.0
"""Score until the selection at the wanted budget no longer changes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from keylayers.scores.options import UntilStable
from keylayers.scores.task import ModuleScores, PartScores, Task

MOST_REPEATS = 10
PATIENCE = 2


class StableSelection:
    """Watches which gates are the best `fraction` as scores come in; ties go by gate order.

    The selection is stable when it has been the same as before `patience` times in a row.
    """

    def __init__(self, fraction: float, patience: int) -> None:
        self.fraction = fraction
        self.patience = patience
        self._num_unchanged = 0
        self._selected: set[int] = set()

    def see(self, scores: Sequence[float]) -> bool:
        """Take in the newest scores; returns whether the selection is stable."""
        size = max(1, int(self.fraction * len(scores) + 0.5))
        selected = set(sorted(range(len(scores)), key=lambda gate: -scores[gate])[:size])
        self._num_unchanged = self._num_unchanged + 1 if selected == self._selected else 0
        self._selected = selected
        return self._num_unchanged >= self.patience


def repeated(
    score: Callable[[Task, Any], ModuleScores], task: Task, options: UntilStable
) -> ModuleScores:
    """Mean scores over repeats that see batches in other orders.

    Stops when the best `options.until_stable` of the modules, or rank-one parts, by mean score has
    stayed the same for two repeats in a row, or after ten.
    """
    assert options.until_stable is not None
    watch = StableSelection(options.until_stable, PATIENCE)
    once = replace(options, until_stable=None)
    found: list[ModuleScores] = []
    is_stable = False
    while not is_stable and len(found) < MOST_REPEATS:
        found.append(score(replace(task, seed=task.seed + 1000 * len(found)), once))
        means = [fmean(scores) for scores in zip(*(run.scores for run in found), strict=True)]
        parts = _mean_parts([run.parts for run in found if run.parts is not None])
        is_stable = watch.see(means if parts is None else _per_parameter(parts))
    errors = [run.standard_errors for run in found if run.standard_errors is not None]
    return replace(
        found[0],
        scores=tuple(means),
        parts=parts,
        standard_errors=tuple(map(_error_of_mean, zip(*errors, strict=True))) if errors else None,
        losses=tuple(loss for run in found for loss in run.losses),
        num_forward=sum(run.num_forward for run in found),
        num_backward=sum(run.num_backward for run in found),
        findings=dict(found[0].findings) | {"num_repeats": len(found), "is_settled": is_stable},
    )


def _mean_parts(runs: Sequence[Sequence[PartScores]]) -> tuple[PartScores, ...] | None:
    def mean(own: Sequence[PartScores]) -> PartScores:
        of_runs = zip(*(parts.scores for parts in own), strict=True)
        return replace(own[0], scores=tuple(map(fmean, of_runs)))

    return tuple(map(mean, zip(*runs, strict=True))) if runs else None


def _per_parameter(parts: Sequence[PartScores]) -> list[float]:
    """What decides the places of all parts."""
    pairs = (zip(own.scores, own.num_parameters, strict=True) for own in parts)
    return [score / size for own in pairs for score, size in own]


def _error_of_mean(errors: Sequence[float]) -> float:
    return sum(error**2 for error in errors) ** 0.5 / len(errors)
