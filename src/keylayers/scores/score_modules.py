# SPDX-License-Identifier: Apache-2.0
"""Score the modules of a trainer's model by any method of the table."""

import time
from collections.abc import Sequence
from dataclasses import replace

from transformers import Trainer

from keylayers.errors import ConfigError
from keylayers.progress import OnStep
from keylayers.scores.methods import find_method, methods
from keylayers.scores.scoring_options import ScoringOptions
from keylayers.scores.task import ModuleScores, Task
from keylayers.scores.until_stable import repeated
from keylayers.trainers.data import samples
from keylayers.trainers.log import TrainerLog
from keylayers.updates import Update


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
    unseen = [update for update in updates if scoring.granularity in update.without_examples]
    if unseen:
        raise ConfigError(
            f"`method` {scoring.method} needs the gradient of single examples, which the "
            f"{type(unseen[0]).__name__} of {unseen[0].module.name} does not have; choose "
            f"elimination"
        )
