# SPDX-License-Identifier: Apache-2.0
"""Train, rank and freeze in one run: the paper's algorithm, from options to files."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from keylayers.commands.selection import Control
from keylayers.files import json_sha256
from keylayers.ranking.ranking import FILE, Ranking
from keylayers.runs.callback import FreezeUnimportant
from keylayers.runs.train_job import TrainedSet, TrainJob
from keylayers.scores.scoring_options import ScoringOptions, scoring_options
from keylayers.training.options import FreezeAction, StabilityOptions


def train_and_freeze(job: TrainJob, output: Path) -> list[TrainedSet]:
    """Fine-tune all modules, freeze the worst when the loss is stable, and go on.

    Args:
        job: Its options ask for `rank_first`.
        output: Folder of the adapter, its record and ranking.json.

    Returns:
        Held-out losses: the base model, the run, and what it is compared with.
    """
    callback = _callback(job, job.options.stability, job.options.scoring)
    inputs = job.inputs_sha256(job.names, callback)
    record = job.finished(output, inputs, None) or _train(job, output, callback, inputs)
    step = record["frozen"]["at_step"]
    action = job.options.selection.action
    controls = {_label(one, action, step): one for one in job.options.selection.controls}
    return job.compare(
        output,
        record,
        Ranking.load(output),
        {label: partial(_control, job, one, step) for label, one in controls.items()},
    )


def _train(job: TrainJob, output: Path, callback: FreezeUnimportant, inputs: str) -> dict[str, Any]:
    """Train with the callback and write the result; its record, which is written too."""
    row, model, result = job.train(job.names, "selected", callback)
    assert callback.selection is not None
    assert callback.frozen_at_step is not None
    row = replace(row, label=_label("selected", callback.action, callback.frozen_at_step))
    ranking = _ranking(job, callback)
    record = job.record | {
        "inputs_sha256": inputs,
        "selection": callback.selection.record(),
        "ranking_sha256": json_sha256(ranking.to_json()),
        "frozen": _frozen_record(callback) | {"modules": list(callback.frozen)},
        "losses": list(result.losses),
        "seconds": result.seconds,
        "results": [asdict(one) for one in (job.base_row(), row)],
    }
    job.save(model, output, record, ranking, {FILE: ranking.to_json()})
    return record


def _callback(
    job: TrainJob, stability: StabilityOptions, scoring: ScoringOptions
) -> FreezeUnimportant:
    wanted = job.options.selection
    return FreezeUnimportant(
        wanted.resolved_freeze,
        action=wanted.action,
        stability=stability,
        method=scoring,
        progress=job.progress,
    )


def _control(job: TrainJob, control: Control, step: int) -> TrainedSet:
    """The same run without a freeze, or with one of other modules after the same step."""
    if control == "all":
        return job.train(job.names, "all")[0]
    at_step = StabilityOptions(max_steps=step, epsilon=0.0)
    callback = _callback(job, at_step, scoring_options(control))
    row = job.train(job.names, control, callback)[0]
    return replace(row, label=_label(control, callback.action, step))


def _label(what: str, action: FreezeAction, step: int) -> str:
    if what == "all":
        return what
    done = {"freeze": "frozen", "remove": "removed"}[action]
    return f"{what} (others {done} at step {step})"


def _frozen_record(callback: FreezeUnimportant) -> dict[str, Any]:
    return {
        "at_step": callback.frozen_at_step,
        "reason": callback.reason,
        "action": callback.action,
    }


def _ranking(job: TrainJob, callback: FreezeUnimportant) -> Ranking:
    """The run's ranking with all that made it, as `keylayers rank` writes it."""
    assert callback.ranking is not None
    provenance = {
        **callback.ranking.provenance,
        **{name: job.record[name] for name in ("environment", "model", "data", "options")},
        "inside_run": _frozen_record(callback) | {"num_steps": job.options.selection.steps},
    }
    return replace(callback.ranking, provenance=provenance)
