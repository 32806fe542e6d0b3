# SPDX-License-Identifier: Apache-2.0
"""Repeat a method on new batches and average, until the selection no longer changes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from keylayers.scores.module_scores import ModuleScores
from keylayers.scores.options import Repeatable
from keylayers.scores.stable_selection import StableSelection
from keylayers.scores.task import Task

MOST_REPEATS = 10
PATIENCE = 2


def repeated(
    score: Callable[[Task, Any], ModuleScores], task: Task, options: Repeatable
) -> ModuleScores:
    """Mean scores over repeats that see batches in other orders.

    Stops when the best `options.until_stable` of the modules by mean score has stayed the same for
    two repeats in a row, or after ten.
    """
    assert options.until_stable is not None
    watch = StableSelection(options.until_stable, PATIENCE)
    once = replace(options, until_stable=None)
    found: list[ModuleScores] = []
    is_stable = False
    while not is_stable and len(found) < MOST_REPEATS:
        found.append(score(replace(task, seed=task.seed + 1000 * len(found)), once))
        means = [fmean(scores) for scores in zip(*(run.scores for run in found), strict=True)]
        is_stable = watch.see(means)
    return replace(
        found[0],
        scores=tuple(means),
        standard_errors=_errors_of_means(found),
        losses=tuple(loss for run in found for loss in run.losses),
        num_forward=sum(run.num_forward for run in found),
        num_backward=sum(run.num_backward for run in found),
        findings=dict(found[0].findings) | {"num_repeats": len(found), "is_settled": is_stable},
    )


def _errors_of_means(found: Sequence[ModuleScores]) -> tuple[float, ...] | None:
    """Standard errors of means of independent repeats; None if the repeats have none."""
    known = [run.standard_errors for run in found if run.standard_errors is not None]
    if len(known) < len(found):
        return None
    return tuple(
        sum(error**2 for error in errors) ** 0.5 / len(found) for errors in zip(*known, strict=True)
    )
