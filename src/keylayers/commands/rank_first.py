# SPDX-License-Identifier: Apache-2.0
"""`keylayers train --rank-first`: train, rank and freeze in one run, the paper's algorithm."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from keylayers.commands.fine_tuning import FineTuned, frozen_label
from keylayers.commands.options import Control, TrainOptions
from keylayers.commands.run_train import TrainJob, open_job
from keylayers.progress import Progress
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import TrainedSet
from keylayers.scores.scoring_options import ScoringOptions, scoring_options
from keylayers.training.freeze import FreezeUnimportant
from keylayers.training.options import StabilityOptions


def run_rank_first(options: TrainOptions, output: Path, progress: Progress) -> list[TrainedSet]:
    """Fine-tune all modules, freeze the lowest-ranked when the loss is stable, and continue."""
    wanted = options.selection

    def freeze(stability: StabilityOptions, scoring: ScoringOptions) -> FreezeUnimportant:
        return FreezeUnimportant(
            0.25 if wanted.freeze is None else wanted.freeze,  # a quarter as in the paper
            action=wanted.action,
            **asdict(stability),
            method=scoring,
            progress=progress,
        )

    with open_job(options, output, progress) as job:
        names = job.session.names
        callback = freeze(options.stability, options.scoring.scoring())
        inputs = job.sets.inputs_sha256(names, callback)
        record = job.finished(inputs, None)
        if record is None:
            trained = job.sets.train(names, "selected", callback, measure_base=True)
            record = _save(job, trained, callback, inputs)
        step = record["frozen"]["at_step"]

        def train(control: Control) -> FineTuned:
            if control == "all":
                return job.sets.train(names, control)
            at_step = StabilityOptions(max_steps=step, epsilon=0.0)
            of_others = freeze(at_step, scoring_options(control))  # looks at no data
            return job.sets.train(names, control, of_others)

        labels = {
            control if control == "all" else frozen_label(control, wanted.action, step): control
            for control in wanted.controls
        }
        return job.compare(record, Ranking.load(output), labels, train)


def _save(
    job: TrainJob, trained: FineTuned, callback: FreezeUnimportant, inputs_sha256: str
) -> dict[str, Any]:
    """Write the result with the ranking that was made inside the run; its record."""
    assert callback.ranking is not None
    assert callback.selection is not None
    frozen = {
        "at_step": callback.frozen_at_step,
        "reason": callback.reason,
        "action": callback.action,
    }
    provenance = {
        **callback.ranking.provenance,
        **{name: job.session.record[name] for name in ("environment", "model", "data", "options")},
        "inside_run": frozen | {"num_steps": job.sets.num_steps},
    }
    own = {
        "inputs_sha256": inputs_sha256,
        "selection": callback.selection.record(),
        "frozen": frozen | {"modules": list(callback.frozen)},
    }
    return job.save(trained, replace(callback.ranking, provenance=provenance), own)
