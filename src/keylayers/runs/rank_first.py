# SPDX-License-Identifier: Apache-2.0
"""Train, rank and freeze in one run: the paper's algorithm, from options to files."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from keylayers.options import Control, MaskOptions, Method, StabilityOptions
from keylayers.ranking import Ranking
from keylayers.records import json_sha256
from keylayers.runs.callback import FreezeUnimportant
from keylayers.runs.train_job import TrainedSet, TrainJob

# As many modules as are frozen are chosen by one of these rankings, which look at no data.
_CONTROL_METHODS: dict[Control, Method] = {"random": "random", "first": "first", "last": "last"}


def train_and_freeze(job: TrainJob, output: Path) -> list[TrainedSet]:
    """Fine-tune all modules, freeze the worst when the loss is stable, and go on.

    Args:
        job: Its options ask for `rank_first`.
        output: Folder of the adapter, its record and ranking.json.

    Returns:
        Held-out losses: the base model, the run, and what it is compared with.
    """
    callback = _callback(job, job.options.stability, job.options.mask)
    row, model, result = job.train(job.names, "selected", callback)
    assert callback.selection is not None
    assert callback.frozen_at_step is not None
    row = replace(row, label=_label("selected", callback))
    rows = [job.base_row(), row]
    ranking = _ranking(job, callback)
    record = job.record | {
        "selection": callback.selection.record(),
        "ranking_sha256": json_sha256(ranking.to_json()),
        "frozen": _frozen_record(callback) | {"modules": list(callback.frozen)},
        "losses": list(result.losses),
        "seconds": result.seconds,
    }
    now = record | {"results": [asdict(one) for one in rows]}
    job.save(model, output, now, ranking, {"ranking.json": ranking.to_json()})
    del model
    for control in dict.fromkeys(job.options.selection.controls):
        rows.append(_control(job, control, callback.frozen_at_step))
    job.add_results(output, record | {"results": [asdict(one) for one in rows]}, ranking)
    return rows


def _callback(job: TrainJob, stability: StabilityOptions, mask: MaskOptions) -> FreezeUnimportant:
    wanted = job.options.selection
    return FreezeUnimportant(
        wanted.resolved_freeze,
        action=wanted.action,
        stability=stability,
        mask=mask,
        progress=job.progress,
    )


def _control(job: TrainJob, control: Control, step: int) -> TrainedSet:
    """The same run without a freeze, or with one of other modules after the same step."""
    if control == "all":
        return job.train(job.names, "all")[0]
    at_step = StabilityOptions(max_steps=step, epsilon=0.0)
    callback = _callback(job, at_step, MaskOptions(method=_CONTROL_METHODS[control]))
    row = job.train(job.names, control, callback)[0]
    return replace(row, label=_label(control, callback))


def _label(what: str, callback: FreezeUnimportant) -> str:
    done = {"freeze": "frozen", "remove": "removed"}[callback.action]
    return f"{what} (others {done} at step {callback.frozen_at_step})"


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
