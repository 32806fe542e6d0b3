# SPDX-License-Identifier: Apache-2.0
"""Score the modules of a trainer's model by any method, once or until the selection is stable."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from transformers import Trainer

from keylayers.errors import ConfigError
from keylayers.progress import OnStep
from keylayers.scores.methods import find_method, methods
from keylayers.scores.options import UntilStable
from keylayers.scores.scoring_options import ScoringOptions
from keylayers.scores.task import ModuleScores, PartScores, Task
from keylayers.trainers.data import samples
from keylayers.trainers.log import TrainerLog
from keylayers.updates import Update

MOST_REPEATS = 10
PATIENCE = 2


def score_modules(
    trainer: Trainer,
    updates: Sequence[Update],
    scoring: ScoringOptions,
    on_step: OnStep | None = None,
) -> ModuleScores:
    """Scores of the updates' modules, repeated if the options ask for a stable selection.

    `on_step` is called after each pass with its number, from 1, and its loss in nats; the trainer's
    own loggers (`report_to`) receive losses and scores.
    """
    start = time.perf_counter()
    check_updates(updates, scoring)
    method, options = find_method(scoring.method), scoring.options
    if samples(trainer) and method.needs not in ("nothing", "gradient"):
        others = [other.name for other in methods().values() if other.needs == "gradient"]
        raise ConfigError(
            f"`method` {method.name} needs a loss that is a function of the data, but "
            f"{type(trainer).__name__} samples new completions for each mask; choose a method that "
            f"uses only the gradient: {', '.join(others)}"
        )
    seed = trainer.args.seed if scoring.mask_seed is None else scoring.mask_seed
    log = TrainerLog(trainer, on_step)
    task, score = Task(trainer, updates, seed, log), method.load()
    found = repeated(score, task, options) if scoring.is_repeated else score(task, options)
    if not scoring.learns_gates:
        log.modules(len(found.losses), dict(zip(found.module_names, found.scores, strict=True)))
    return replace(found, seconds=time.perf_counter() - start)


def check_updates(updates: Sequence[Update], scoring: ScoringOptions) -> None:
    """Refuse updates that the method cannot score."""
    if find_method(scoring.method).needs != "examples":
        return
    unseen = [update for update in updates if not update.sees_examples(scoring.granularity)]
    if unseen:
        raise ConfigError(
            f"`method` {scoring.method} needs the gradient of single examples, which the "
            f"{type(unseen[0]).__name__} of {unseen[0].module.name} does not have; choose "
            f"elimination"
        )


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
