# SPDX-License-Identifier: Apache-2.0
"""`keylayers train --rank-first`: train, rank and freeze in one run, the paper's algorithm."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from keylayers.commands.fine_tuning import Trained
from keylayers.commands.options import Control, SelectionOptions, TrainOptions
from keylayers.commands.run_train import TrainJob, base_row, open_job
from keylayers.progress import Progress
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import TrainedSet
from keylayers.scores.scoring_options import ScoringOptions, scoring_options
from keylayers.training.freeze import FreezeUnimportant
from keylayers.training.options import FreezeAction, StabilityOptions


def run_rank_first(options: TrainOptions, output: Path, progress: Progress) -> list[TrainedSet]:
    """Fine-tune all modules, freeze the lowest-ranked when the loss is stable, and continue."""
    wanted = options.selection
    with open_job(options, output, progress) as job:
        callback = _callback(job, wanted, options.stability, options.scoring.scoring())
        inputs = job.sets.inputs_sha256(job.session.names, callback)
        record = job.finished(inputs, None)
        if record is None:
            trained = job.sets.train(job.session.names, "selected", callback, measure_base=True)
            record = _save(job, trained, callback, inputs)
        step = record["frozen"]["at_step"]
        labels = {_label(control, wanted.action, step): control for control in wanted.controls}
        train = partial(_control, job, wanted, step)
        return job.compare(record, Ranking.load(output), labels, train)


def _save(
    job: TrainJob, trained: Trained, callback: FreezeUnimportant, inputs_sha256: str
) -> dict[str, Any]:
    """Write the result with the ranking that was made inside the run; its record."""
    assert callback.ranking is not None
    assert callback.selection is not None
    assert callback.frozen_at_step is not None
    frozen = {
        "at_step": callback.frozen_at_step,
        "reason": callback.reason,
        "action": callback.action,
    }
    provenance = {
        **callback.ranking.provenance,
        **{name: job.record[name] for name in ("environment", "model", "data", "options")},
        "inside_run": frozen | {"num_steps": job.sets.num_steps},
    }
    label = _label("selected", callback.action, callback.frozen_at_step)
    rows = [base_row(trained), trained.row.model_copy(update={"label": label})]
    record = {
        "inputs_sha256": inputs_sha256,
        "selection": callback.selection.record(),
        "frozen": frozen | {"modules": list(callback.frozen)},
        "results": [row.model_dump() for row in rows],
    }
    return job.save(trained, replace(callback.ranking, provenance=provenance), record)


def _control(job: TrainJob, wanted: SelectionOptions, step: int, control: Control) -> Trained:
    """A run without a freeze, or with a freeze of other modules after the same step."""
    if control == "all":
        return job.sets.train(job.session.names, "all")
    at_step = StabilityOptions(max_steps=step, epsilon=0.0)
    callback = _callback(job, wanted, at_step, scoring_options(control))  # looks at no data
    trained = job.sets.train(job.session.names, control, callback)
    label = _label(control, wanted.action, step)
    return replace(trained, row=trained.row.model_copy(update={"label": label}))


def _callback(
    job: TrainJob, wanted: SelectionOptions, stability: StabilityOptions, scoring: ScoringOptions
) -> FreezeUnimportant:
    return FreezeUnimportant(
        0.25 if wanted.freeze is None else wanted.freeze,  # a quarter as in the paper
        action=wanted.action,
        **asdict(stability),
        method=scoring,
        progress=job.session.progress,
    )


def _label(what: str, action: FreezeAction, step: int) -> str:
    if what == "all":
        return what
    done = {"freeze": "frozen", "remove": "removed"}[action]
    return f"{what} (others {done} at step {step})"
