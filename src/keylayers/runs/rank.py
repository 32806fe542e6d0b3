# SPDX-License-Identifier: Apache-2.0
"""Rank the modules of a model for a fine-tune.

Three ways in: a model and data (stage 1 fine-tunes, stage 2 learns the scores), an adapter that
exists already, and a second checkpoint. The last two need stage 2 only.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Trainer

from keylayers.commands.run_options import RankOptions
from keylayers.data.prepare import prepare
from keylayers.environment import environment
from keylayers.evaluation.loss import held_out_loss
from keylayers.files import check_replaceable, output_folder
from keylayers.gates import gated, group_modules
from keylayers.model.loading import describe, load_tokenizer, max_positions
from keylayers.model.options import UpdateOptions
from keylayers.model.weights import weights_sha256
from keylayers.progress import Progress, Silent
from keylayers.ranking.ranking import FILE, Ranking
from keylayers.runs.stage_1 import from_stage_1, stage_1_folder
from keylayers.runs.update import RankJob, TunedModel, existing_update, load_base
from keylayers.scores.score_modules import score_modules
from keylayers.training.objectives import prepared_examples
from keylayers.training.options import LOSS_UNITS
from keylayers.training.rank_modules import scores_record, to_ranking
from keylayers.training.run import make_loss_trainer
from keylayers.updates import Update


def rank(
    options: RankOptions,
    output: Path,
    progress: Progress | None = None,
    *,
    stage_1_in: Path | None = None,
) -> Ranking:
    """Run both stages, or stage 2 on an update that exists, and write `output`/ranking.json.

    Stage 1's adapter is written to `output`/adapter. A run that was stopped in stage 1 goes on at
    its last checkpoint when it is called again, and ends as if it had not been stopped.

    Args:
        options: Everything that decides the result.
        output: Folder for the results.
        progress: Where to report to.
        stage_1_in: Folder for stage 1's adapter instead, for rankings that share it.

    Returns:
        The ranking, as written.

    Raises:
        KeylayersError: a bad option, model, data set or output; nothing is left behind then.
    """
    start = time.perf_counter()
    with output_folder(output):
        job = _prepared(options, stage_1_in or output, progress or Silent())
        provenance: dict[str, Any] = {
            "environment": environment(),
            "model": job.model_record,
            "data": job.data.record(),
            "options": options.flat(),
        }
        update = _find_update(job)
        trainer = make_loss_trainer(
            update.model,
            job.tokenizer,
            job.data,
            options.training,
            load_reference=lambda: load_base(options),
        )
        provenance |= update.record
        provenance["loss_unit"] = LOSS_UNITS[options.training.objective]
        provenance["held_out_loss_nats"] = _held_out_losses(
            trainer, update.updates, prepared_examples(trainer)["held_out"]
        )
        modules = [one.module for one in update.updates]
        num_gates = len(group_modules(modules, options.scoring.granularity))
        total = options.scoring.num_steps(num_gates)
        with job.progress.stage("stage 2: scoring modules", total) as on_step:
            found = score_modules(trainer, update.updates, options.scoring, on_step)
        provenance |= scores_record(found, update.updates)
        provenance["seconds"] = {
            "stage_1": update.record.get("stage_1", {}).get("seconds", 0.0),
            "stage_2": found.seconds,
            "total": time.perf_counter() - start,
        }
        ranking = to_ranking(update.updates, found, options.scoring, provenance)
        ranking.save(output / FILE)
    return ranking


def _find_update(job: RankJob) -> TunedModel:
    """The model with the update to rank, by whichever of the three ways the options ask for."""
    if job.options.update == UpdateOptions():
        return from_stage_1(job)
    towers = job.options.model.towers
    return existing_update(job.model, job.options.update, job.progress, towers)


def _prepared(options: RankOptions, stage_1_in: Path, progress: Progress) -> RankJob:
    """Everything loaded and checked, before any long work."""
    if options.update == UpdateOptions():  # stage 1 will write its adapter
        check_replaceable(stage_1_folder(options, stage_1_in))
    tokenizer = load_tokenizer(options.model)
    model = load_base(options)
    data = prepare(options.data, tokenizer, max_positions(model), options.training.objective)
    data.give_template(tokenizer)
    for line in data.summary():
        progress.note(line)
    record = describe(options.model, model) | {"weights_sha256": weights_sha256(model)}
    return RankJob(options, stage_1_in, progress, model, tokenizer, data, record)


def _held_out_losses(
    trainer: Trainer, updates: Sequence[Update], held_out: Dataset
) -> dict[str, float]:
    """Held-out loss with all gates closed (the base model) and all open (the tuned)."""
    losses = {}
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        with gated(trainer.model, updates, initial_score=value, link="identity"):
            losses[name] = held_out_loss(trainer, held_out)
    return losses
