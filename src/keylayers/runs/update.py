# SPDX-License-Identifier: Apache-2.0
"""The update to rank: made by stage 1, or an adapter or a checkpoint that exists already."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keylayers.apply.freeze import train_only
from keylayers.apply.saving import save_tuned
from keylayers.model_map import map_modules
from keylayers.models import Checkpoint, load_adapter, load_model
from keylayers.options import ModelOptions, RankOptions, Towers, UpdateOptions
from keylayers.progress import Progress
from keylayers.records import (
    RECORD,
    STAGE_1_ADAPTER,
    STAGE_1_CHECKPOINT,
    environment,
    json_sha256,
)
from keylayers.report.model_card import model_card
from keylayers.training.prepared import PreparedData
from keylayers.training.run import fine_tune, make_trainer, new_adapter
from keylayers.training.step_scores import StepScores
from keylayers.updates import Update, adapter_updates, dense_updates
from keylayers.updates.adalora import is_adalora
from keylayers.updates.adapter import always_on
from keylayers.updates.dense import take_other_weights
from keylayers.weights import adapter_sha256, tensors_sha256, weights_sha256


@dataclass(frozen=True)
class RankJob:
    """What all parts of one ranking run share."""

    options: RankOptions
    output: Path
    progress: Progress
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    model_record: dict[str, Any]


@dataclass(frozen=True)
class TunedModel:
    """A model with an update that gates can scale, and how it came about."""

    model: PreTrainedModel | PeftModel
    updates: Sequence[Update]
    record: dict[str, Any]


def find_update(job: RankJob) -> TunedModel:
    """The model with the update to rank, by whichever of the three ways the options ask for."""
    if job.options.update == UpdateOptions():
        return _from_stage_1(job)
    towers = job.options.model.towers
    return existing_update(job.model, job.options.update, job.progress, towers)


def existing_update(
    model: PreTrainedModel,
    options: UpdateOptions,
    progress: Progress,
    towers: Towers = "language",
) -> TunedModel:
    """The model with the update of an adapter or a second checkpoint.

    Args:
        model: The base model; it carries the adapter afterwards.
        options: Either `adapter` or `tuned` is given.
        progress: Where to say what is not gated.
        towers: Which stacks of blocks a second checkpoint is ranked on.
    """
    if options.adapter is not None:
        return _from_adapter(model, options.adapter, progress)
    assert options.tuned is not None
    return _from_checkpoint(model, options.tuned, progress, towers)


def _from_adapter(model: PreTrainedModel, adapter: str, progress: Progress) -> TunedModel:
    tuned = load_adapter(model, adapter)
    outside = always_on(tuned)
    if outside:
        progress.note(f"not ranked, always on: the adapter's own {', '.join(outside)}")
    record = {"name": adapter, "weights_sha256": adapter_sha256(tuned), "always_on": outside}
    return TunedModel(tuned, adapter_updates(tuned), {"adapter": record})


def _from_checkpoint(
    model: PreTrainedModel, tuned: str, progress: Progress, towers: Towers
) -> TunedModel:
    checkpoint = Checkpoint.open(ModelOptions(model=tuned))
    updates = dense_updates(model, checkpoint, towers)
    others = take_other_weights(model, checkpoint, towers)
    if others:
        progress.note(
            f"not ranked, taken from the tuned checkpoint: {len(others)} other weights that differ "
            f"({', '.join(others[:2])}{', ...' if len(others) > 2 else ''})"
        )
    record = {
        "name": tuned,
        "weights_sha256": tensors_sha256(
            (name, checkpoint[name]) for name, _ in model.named_parameters()
        ),
        "other_weights_that_differ": others,
    }
    return TunedModel(model, updates, {"tuned": record})


def base_options(options: RankOptions) -> ModelOptions:
    """How the base model is loaded: stage 1 as a full fine-tune needs its float32 values."""
    trains_weights = options.update == UpdateOptions() and options.training.is_full
    return replace(options.model, dtype="float32") if trains_weights else options.model


def load_base(options: RankOptions) -> PreTrainedModel:
    """The base model as a ranking needs it."""
    return load_model(base_options(options), options.training.objective)


def _from_stage_1(job: RankJob) -> TunedModel:
    """An ordinary fine-tune of all modules until the loss is stable or the cap is reached.

    A finished stage 1 of the very same inputs in the output folder is taken as it is, so that a run
    that was stopped in stage 2 does not train again.
    """
    inputs = _inputs_sha256(job)
    is_full = job.options.training.is_full
    folder = job.output / (STAGE_1_CHECKPOINT if is_full else STAGE_1_ADAPTER)
    stage_1 = _finished(folder, inputs)
    model = job.model
    if stage_1 is not None:
        job.progress.note(f"stage 1 of the same inputs is taken from {folder}")
    else:
        tuned, stage_1 = _train_all(job)
        record = {"inputs_sha256": inputs, "options": job.options.flat(), "stage_1": stage_1}
        inputs_record = {"model": job.model_record, "data": job.data.record()}
        card = model_card("rank", record | inputs_record | {"environment": environment()}, None)
        save_tuned(tuned, job.tokenizer, folder, record, card)
        if not is_full and not is_adalora(tuned):
            return TunedModel(tuned, adapter_updates(tuned), {"stage_1": stage_1})
        # θ_0 again, with θ_t on disk; or AdaLoRA as it is written, without the ranks that it cut
        model = load_base(job.options)
    where = UpdateOptions(tuned=str(folder)) if is_full else UpdateOptions(adapter=str(folder))
    found = existing_update(model, where, job.progress, job.options.model.towers)
    if not is_full:
        stage_1 |= {"adapter_sha256": found.record["adapter"]["weights_sha256"]}
    return TunedModel(found.model, found.updates, {"stage_1": stage_1})


def _train_all(job: RankJob) -> tuple[PreTrainedModel | PeftModel, dict[str, Any]]:
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
    with job.progress.stage("stage 1: fine-tuning all modules", cap) as on_step:
        result = fine_tune(trainer, job.options.stability, on_step)
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
    """A hash of everything that decides what stage 1 gives; loggers do not."""
    training = replace(job.options.training, report_to=())
    return json_sha256(
        {
            "environment": environment(),
            "model": job.model_record,
            "split": job.data.record()["split_sha256"],
            "training": asdict(training),
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
