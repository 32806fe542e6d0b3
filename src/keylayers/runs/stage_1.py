# SPDX-License-Identifier: Apache-2.0
"""Stage 1: an ordinary fine-tune of all modules, whose update is then ranked."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from keylayers.apply.freeze import train_only
from keylayers.apply.saving import save_tuned
from keylayers.commands.repeat import how_it_was_made
from keylayers.commands.run_options import RankOptions
from keylayers.environment import environment
from keylayers.files import (
    RECORD,
    STAGE_1_ADAPTER,
    STAGE_1_CHECKPOINT,
    json_sha256,
    remove_unfinished,
    unfinished,
)
from keylayers.model.modules import map_modules
from keylayers.model.options import UpdateOptions
from keylayers.model.sharding import is_sharded
from keylayers.model.weights import adapter_sha256, weights_sha256
from keylayers.report.model_card import model_card
from keylayers.runs.update import RankJob, TunedModel, existing_update, load_base
from keylayers.training.checkpoints import Checkpoints
from keylayers.training.run import fine_tune, make_trainer, new_adapter
from keylayers.training.step_scores import StepScores
from keylayers.updates import adapter_updates
from keylayers.updates.adalora import is_adalora


def stage_1_folder(options: RankOptions, parent: Path) -> Path:
    """Where stage 1 leaves its adapter or checkpoint below `parent`."""
    return parent / (STAGE_1_CHECKPOINT if options.training.is_full else STAGE_1_ADAPTER)


def from_stage_1(job: RankJob) -> TunedModel:
    """The model with an update of all modules, trained until the loss is stable or the cap reached.

    A finished stage 1 of the very same inputs in its folder is taken as it is, so that a run that
    was stopped in stage 2 does not train again; one that was stopped goes on at its last
    checkpoint.
    """
    inputs = _inputs_sha256(job)
    is_full = job.options.training.is_full
    folder = stage_1_folder(job.options, job.stage_1_in)
    stage_1 = _finished(folder, inputs)
    model = job.model
    if stage_1 is not None:
        remove_unfinished(folder)
        job.progress.note(f"stage 1 of the same inputs is taken from {folder}")
    else:
        with unfinished(folder) as before:
            save_steps = job.options.training.save_steps
            checkpoints = Checkpoints(before / "stage-1", inputs, save_steps)
            tuned, stage_1 = _train_all(job, checkpoints)
            record = {"inputs_sha256": inputs, "options": job.options.flat(), "stage_1": stage_1}
            inputs_record = {"model": job.model_record, "data": job.data.record()}
            made = how_it_was_made("rank", job.options.flat())
            inputs_record |= {"environment": environment()}
            card = model_card(record | inputs_record, None, made)
            save_tuned(tuned, job.tokenizer, folder, record, card)
        if not (is_full or is_adalora(tuned) or is_sharded(tuned)):
            return TunedModel(tuned, adapter_updates(tuned), {"stage_1": stage_1})
        # θ_0 again, with θ_t on disk; or AdaLoRA as it is written, without the ranks that it cut;
        # or weights that are not spread over processes yet: a trainer is built on whole ones
        model = load_base(job.options)
    where = UpdateOptions(tuned=str(folder)) if is_full else UpdateOptions(adapter=str(folder))
    found = existing_update(model, where, job.progress, job.options.model.towers)
    if not is_full:
        stage_1 |= {"adapter_sha256": found.record["adapter"]["weights_sha256"]}
    return TunedModel(found.model, found.updates, {"stage_1": stage_1})


def _train_all(
    job: RankJob, checkpoints: Checkpoints
) -> tuple[PreTrainedModel | PeftModel, dict[str, Any]]:
    names = [info.name for info in map_modules(job.model, job.options.model.towers)]
    training = job.options.training
    cap = job.options.stability.stage_1_cap
    tuned: PreTrainedModel | PeftModel = job.model
    if training.is_full:
        train_only(job.model, names)
    else:
        tuned = new_adapter(job.model, names, training, num_steps=cap)
    trainer = make_trainer(
        tuned,
        job.tokenizer,
        job.data.train,
        training,
        num_steps=cap,
        max_length=job.data.max_length,
        load_reference=lambda: load_base(job.options),
        title="stage-1",
    )
    scores = StepScores()
    if not training.is_full:
        trainer.add_callback(scores)
    if checkpoints.last is not None:
        job.progress.note(f"stage 1 goes on after step {checkpoints.last_step}")
    with job.progress.stage("stage 1: fine-tuning all modules", cap) as on_step:
        result = fine_tune(trainer, job.options.stability, on_step, checkpoints=checkpoints)
    reason = "the loss is stable" if result.stopped_by == "stable" else "the cap is reached"
    job.progress.note(f"stage 1 ended after {result.num_steps} steps: {reason}")
    return tuned, {
        "losses": list(result.losses),
        "num_steps": result.num_steps,
        "num_trained_parameters": sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        "stopped_by": result.stopped_by,
        "learning_rate": trainer.args.learning_rate,
        "seconds": result.seconds,
        "step_scores": dict(scores.scores),
        **_tuned_sha256(tuned),
    }


def _tuned_sha256(tuned: PreTrainedModel | PeftModel) -> dict[str, str]:
    """What tells this fine-tune from another: the hash of the adapter, or of all weights."""
    if isinstance(tuned, PeftModel):
        return {"adapter_sha256": adapter_sha256(tuned)}
    return {"weights_sha256": weights_sha256(tuned)}


def _inputs_sha256(job: RankJob) -> str:
    """A hash of everything that decides what stage 1 gives."""
    return json_sha256(
        {
            "environment": environment(),
            "model": job.model_record,
            "split": job.data.record()["split_sha256"],
            "training": job.options.training.decisive(),
            "stability": asdict(job.options.stability),
        }
    )


def _finished(folder: Path, inputs: str) -> dict[str, Any] | None:
    """The record of a finished stage 1 in `folder`, if it had the same inputs."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_same = isinstance(record, dict) and record.get("inputs_sha256") == inputs
    return record["stage_1"] if is_same else None
