# SPDX-License-Identifier: Apache-2.0
"""Score the modules of a trainer's model by any method of the table."""

import time
from collections.abc import Sequence
from dataclasses import replace

from transformers import Trainer

from keylayers.errors import ConfigError
from keylayers.progress import OnStep
from keylayers.scores.methods import Method, find_method, methods
from keylayers.scores.module_scores import ModuleScores
from keylayers.scores.options import Repeatable
from keylayers.scores.repeated import repeated
from keylayers.scores.scoring_options import ScoringOptions
from keylayers.scores.task import Task
from keylayers.trainers.batches import samples
from keylayers.trainers.log import TrainerLog
from keylayers.updates import Update


def score_modules(
    trainer: Trainer,
    updates: Sequence[Update],
    scoring: ScoringOptions,
    on_step: OnStep | None = None,
) -> ModuleScores:
    """Scores of the updates' modules, repeated if the options ask for a stable selection.

    The trainer's own loggers (`report_to`) receive losses and scores.

    Args:
        trainer: Any transformers or TRL trainer; its model carries the updates.
        updates: From `adapter_updates` or `dense_updates` on that model.
        scoring: Which method, and how.
        on_step: Called after each pass with its number, from 1, and its loss in nats.

    Raises:
        ConfigError: the trainer samples its data, and the method needs losses or tokens.
        LossError: the loss became NaN or infinite.
        GuardError: something other than the gates changed, or a gate took no part.
    """
    start = time.perf_counter()
    method, options = find_method(scoring.method), scoring.options
    _check_needs(trainer, method)
    seed = trainer.args.seed if scoring.mask_seed is None else scoring.mask_seed
    score = method.load()
    if method.learns_gates:  # it logs each step itself
        found = score(Task(trainer, updates, seed, on_step), options)
    else:
        log = TrainerLog(trainer)
        task = Task(trainer, updates, seed, log.losses(on_step))
        if isinstance(options, Repeatable) and options.until_stable is not None:
            found = repeated(score, task, options)
        else:
            found = score(task, options)
        log.modules(len(found.losses), dict(zip(found.module_names, found.scores, strict=True)))
    return replace(found, seconds=time.perf_counter() - start)


def _check_needs(trainer: Trainer, method: Method) -> None:
    if method.needs in ("nothing", "gradient") or not samples(trainer):
        return
    others = [other.name for other in methods().values() if other.needs == "gradient"]
    raise ConfigError(
        f"`method` {method.name} needs a loss that is a function of the data, but "
        f"{type(trainer).__name__} samples new completions for each mask; choose a method that "
        f"uses only the gradient: {', '.join(others)}"
    )
