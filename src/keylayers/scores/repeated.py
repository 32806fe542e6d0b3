# SPDX-License-Identifier: Apache-2.0
"""Repeat a method on new batches and average, until the selection no longer changes."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

from transformers import Trainer

from keylayers.options import MaskOptions
from keylayers.progress import OnStep
from keylayers.scores.module_scores import ModuleScores
from keylayers.scores.stable_selection import SettledSelection
from keylayers.updates import Update

MOST_REPEATS = 10
PATIENCE = 2

ScoreFunction = Callable[[Trainer, Sequence[Update], MaskOptions, OnStep | None], ModuleScores]


def repeated(
    method: ScoreFunction,
    trainer: Trainer,
    updates: Sequence[Update],
    options: MaskOptions,
    on_step: OnStep | None = None,
) -> ModuleScores:
    """Mean scores over repeats that see batches in other orders.

    Stops when the best `options.until_stable` of the modules by mean score has stayed the same for
    two repeats in a row, or after ten.
    """
    assert options.until_stable is not None
    watch = SettledSelection(options.until_stable, PATIENCE)
    seed = trainer.args.seed if options.mask_seed is None else options.mask_seed
    found: list[ModuleScores] = []
    is_settled = False
    while not is_settled and len(found) < MOST_REPEATS:
        once = replace(options, mask_seed=seed + 1000 * len(found), until_stable=None)
        found.append(method(trainer, updates, once, on_step))
        means = [fmean(scores) for scores in zip(*(one.scores for one in found), strict=True)]
        is_settled = watch.see(means)
    return replace(
        found[0],
        scores=tuple(means),
        standard_errors=_errors_of_means(found),
        losses=tuple(loss for one in found for loss in one.losses),
        seconds=sum(one.seconds for one in found),
        num_forward=sum(one.num_forward for one in found),
        num_backward=sum(one.num_backward for one in found),
        findings=dict(found[0].findings) | {"num_repeats": len(found), "is_settled": is_settled},
    )


def _errors_of_means(found: Sequence[ModuleScores]) -> tuple[float, ...] | None:
    """Of independent repeats; None if they have none."""
    known = [one.standard_errors for one in found if one.standard_errors is not None]
    if len(known) < len(found):
        return None
    return tuple(
        sum(error**2 for error in errors) ** 0.5 / len(found) for errors in zip(*known, strict=True)
    )
