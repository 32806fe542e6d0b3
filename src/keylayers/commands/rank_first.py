# SPDX-License-Identifier: Apache-2.0
"""`keylayers train --rank-first`: train, rank and freeze in one run, the paper's algorithm."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from keylayers.commands.fine_tuning import Trained
from keylayers.commands.selection import Control, SelectionOptions
from keylayers.commands.train_job import TrainJob, base_row, compare, finished, save
from keylayers.files import json_sha256
from keylayers.ranking.ranking import FILE, Ranking
from keylayers.ranking.record import TrainedSet
from keylayers.scores.scoring_options import ScoringOptions, scoring_options
from keylayers.training.freeze import FreezeUnimportant
from keylayers.training.options import FreezeAction, StabilityOptions


@dataclass(frozen=True)
class RankFirst:
    """What decides a run with `rank_first`, apart from how it trains."""

    selection: SelectionOptions
    stability: StabilityOptions
    scoring: ScoringOptions


def train_and_freeze(job: TrainJob, options: RankFirst) -> list[TrainedSet]:
    """Fine-tune all modules, freeze the lowest-ranked when the loss is stable, and continue.

    Args:
        job: Its output gets the adapter, its record and ranking.json.
        options: When and what to freeze.

    Returns:
        Held-out losses: of the base model, the run, and the controls.
    """
    callback = _callback(job, options, options.stability, options.scoring)
    inputs = job.sets.inputs_sha256(job.session.names, callback)
    record = finished(job, inputs, None) or _train(job, options, callback, inputs)
    step = record["frozen"]["at_step"]
    controls: dict[str, Callable[[], Trained]] = {}
    for control in options.selection.controls:
        label = _label(control, options.selection.action, step)
        controls[label] = partial(_control, job, options, control, step)
    return compare(job, record, Ranking.load(job.output), controls)


def _train(
    job: TrainJob, options: RankFirst, callback: FreezeUnimportant, inputs: str
) -> dict[str, Any]:
    """Train with the callback and write the result; its record, which is written too."""
    trained = job.sets.train(job.session.names, "selected", callback, measure_base=True)
    assert callback.ranking is not None
    assert callback.selection is not None
    assert callback.frozen_at_step is not None
    label = _label("selected", callback.action, callback.frozen_at_step)
    frozen = {
        "at_step": callback.frozen_at_step,
        "reason": callback.reason,
        "action": callback.action,
    }
    provenance = {
        **callback.ranking.provenance,
        **{name: job.record[name] for name in ("environment", "model", "data", "options")},
        "inside_run": frozen | {"num_steps": options.selection.steps},
    }
    ranking = replace(callback.ranking, provenance=provenance)
    rows = [base_row(trained.base_loss_nats), trained.row.model_copy(update={"label": label})]
    record = job.record | {
        "inputs_sha256": inputs,
        "selection": callback.selection.record(),
        "ranking_sha256": json_sha256(ranking.to_json()),
        "frozen": frozen | {"modules": list(callback.frozen)},
        "losses": list(trained.result.losses),
        "seconds": trained.result.seconds,
        "results": [row.model_dump() for row in rows],
    }
    save(job, trained.model, record, ranking, {FILE: ranking.to_json()})
    return record


def _control(job: TrainJob, options: RankFirst, control: Control, step: int) -> Trained:
    """A run without a freeze, or with a freeze of other modules after the same step."""
    if control == "all":
        return job.sets.train(job.session.names, "all")
    at_step = StabilityOptions(max_steps=step, epsilon=0.0)
    callback = _callback(job, options, at_step, scoring_options(control))  # looks at no data
    trained = job.sets.train(job.session.names, control, callback)
    label = _label(control, callback.action, step)
    return replace(trained, row=trained.row.model_copy(update={"label": label}))


def _callback(
    job: TrainJob, options: RankFirst, stability: StabilityOptions, scoring: ScoringOptions
) -> FreezeUnimportant:
    return FreezeUnimportant(
        options.selection.resolved_freeze,
        action=options.selection.action,
        **asdict(stability),
        method=scoring,
        progress=job.progress,
    )


def _label(what: str, action: FreezeAction, step: int) -> str:
    if what == "all":
        return what
    done = {"freeze": "frozen", "remove": "removed"}[action]
    return f"{what} (others {done} at step {step})"
