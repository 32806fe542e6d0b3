# SPDX-License-Identifier: Apache-2.0
"""Rank the modules of a model for a fine-tune.

Three ways in: a model and data (stage 1 fine-tunes, stage 2 learns the scores), an adapter that
exists already, and a second checkpoint. The last two need stage 2 only.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from keylayers.apply.adapter import save_adapter
from keylayers.evaluation.loss import held_out_loss
from keylayers.gates import gated
from keylayers.mask.learning import LearnedScores, OnStep
from keylayers.model_map import map_modules
from keylayers.models import (
    Checkpoint,
    describe,
    load_adapter,
    load_model,
    load_tokenizer,
    max_positions,
)
from keylayers.options import MaskOptions, ModelOptions, RankOptions
from keylayers.ranking import RankedModule, Ranking
from keylayers.records import environment, output_folder
from keylayers.runs.progress import Progress, Silent
from keylayers.scores.ila import ila
from keylayers.training.data import PreparedData, prepare
from keylayers.training.run import TrainingResult, fine_tune, make_trainer, new_lora
from keylayers.updates import Update, dense_updates, lora_updates
from keylayers.updates.dense import take_other_weights
from keylayers.updates.lora import ungated_tuner_layers
from keylayers.weights import adapter_sha256, tensors_sha256, weights_sha256

METHOD = "ila"


def rank_modules(
    trainer: Trainer, options: MaskOptions | None = None, on_step: OnStep | None = None
) -> Ranking:
    """Rank the modules that a trainer's LoRA adapter updates, by its own loss and data.

    The trainer is one that you built and trained: TRL's or transformers' own, or a subclass with
    its own loss. It and its model are given back as they were.

    Args:
        trainer: Its `model` carries a LoRA adapter; its `train_dataset` is what the scores are
            learned on.
        options: How to learn the scores.
        on_step: Called after each step with its number, from 1, and its loss in nats.

    Raises:
        ModelError: the model carries no update that gates can scale.
        LossError: the loss became NaN or infinite.
        GuardError: something else than the gates changed, or a gate took no part.
    """
    options = options or MaskOptions()
    updates = lora_updates(trainer.model)
    learned = ila(trainer, updates, options, on_step)
    provenance = {
        "environment": environment(),
        "model": {
            "name": trainer.model.config._name_or_path,
            "model_type": trainer.model.config.model_type,
            "weights_sha256": weights_sha256(trainer.model),
        },
        "trainer": type(trainer).__name__,
        "options": asdict(options),
        "mask": _mask_record(learned, options),
    }
    return _to_ranking(updates, learned, options, provenance)


def rank(options: RankOptions, output: Path, progress: Progress | None = None) -> Ranking:
    """Run both stages, or stage 2 on an update that exists, and write `output`/ranking.json.

    Stage 1's adapter is written to `output`/adapter.

    Args:
        options: Everything that decides the result.
        output: Folder for the results.
        progress: Where to report to.

    Returns:
        The ranking, as written.

    Raises:
        KeylayersError: a bad option, model, data set or output; nothing is left behind then.
    """
    progress = progress or Silent()
    start = time.perf_counter()
    with output_folder(output):
        tokenizer = load_tokenizer(options.model)
        model = load_model(options.model)
        data = prepare(options.data, tokenizer, max_positions(model))
        for line in data.summary():
            progress.note(line)
        provenance: dict[str, Any] = {
            "environment": environment(),
            "model": describe(options.model, model) | {"weights_sha256": weights_sha256(model)},
            "data": data.record(),
            "options": options.flat(),
        }
        model, updates, update_record = _update(model, tokenizer, data, options, output, progress)
        trainer = make_trainer(
            model, tokenizer, data.train, options.training, num_steps=options.mask.mask_steps
        )
        provenance |= update_record
        provenance["held_out_loss_nats"] = _held_out_losses(trainer, updates, data.held_out)
        with progress.stage("stage 2: learning scores", options.mask.mask_steps) as on_step:
            learned = ila(trainer, updates, options.mask, on_step)
        provenance["mask"] = _mask_record(learned, options.mask)
        provenance["seconds"] = {
            "stage_1": update_record.get("stage_1", {}).get("seconds", 0.0),
            "stage_2": learned.seconds,
            "total": time.perf_counter() - start,
        }
        ranking = _to_ranking(updates, learned, options.mask, provenance)
        ranking.save(output / "ranking.json")
    return ranking


def _update(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    options: RankOptions,
    output: Path,
    progress: Progress,
) -> tuple[PreTrainedModel | PeftModel, Sequence[Update], dict[str, Any]]:
    """The model with the update to rank, however it comes about, and its record."""
    if options.update.adapter is not None:
        tuned = load_adapter(model, options.update.adapter)
        outside = ungated_tuner_layers(tuned)
        if outside:
            progress.note(f"not ranked, always on: the adapter's update of {', '.join(outside)}")
        record: dict[str, Any] = {
            "name": options.update.adapter,
            "weights_sha256": adapter_sha256(tuned),
        }
        return tuned, lora_updates(tuned), {"adapter": record}
    if options.update.tuned is not None:
        source = ModelOptions(model=options.update.tuned)
        checkpoint = Checkpoint.open(source)
        updates = dense_updates(model, checkpoint)
        others = take_other_weights(model, checkpoint)
        if others:
            progress.note(
                f"not ranked, taken from the tuned checkpoint: {len(others)} other weights that "
                f"differ "
                f"({', '.join(others[:2])}, ...)"
            )
        record = {
            "name": options.update.tuned,
            "weights_sha256": tensors_sha256((name, checkpoint[name]) for name in checkpoint),
            "other_weights_that_differ": others,
        }
        return model, updates, {"tuned": record}
    tuned, result = _stage_1(model, tokenizer, data, options, progress)
    record = {
        "losses": list(result.losses),
        "num_steps": result.num_steps,
        "num_trained_parameters": sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        "stopped_by": result.stopped_by,
        "seconds": result.seconds,
        "adapter_sha256": adapter_sha256(tuned),
    }
    save_adapter(
        tuned, tokenizer, output / "adapter", {"options": options.flat(), "stage_1": record}
    )
    return tuned, lora_updates(tuned), {"stage_1": record}


def _stage_1(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    options: RankOptions,
    progress: Progress,
) -> tuple[PeftModel, TrainingResult]:
    """An ordinary LoRA fine-tune of all modules until the loss is stable or the cap is reached."""
    names = [info.name for info in map_modules(model)]
    tuned = new_lora(model, names, options.training)
    cap = options.stability.max_steps
    trainer = make_trainer(tuned, tokenizer, data.train, options.training, num_steps=cap)
    with progress.stage("stage 1: fine-tuning all modules", cap) as on_step:
        result = fine_tune(trainer, options.stability, on_step)
    reason = "the loss is stable" if result.stopped_by == "stable" else "the cap is reached"
    progress.note(f"stage 1 ended after {result.num_steps} steps: {reason}")
    return tuned, result


def _held_out_losses(
    trainer: Trainer, updates: Sequence[Update], held_out: Dataset
) -> dict[str, float]:
    """Held-out loss in nats with all gates closed (the base model) and all open (the tuned)."""
    losses = {}
    for name, value in (("base", 0.0), ("tuned", 1.0)):
        with gated(trainer.model, updates, initial_score=value, link="identity"):
            losses[name] = held_out_loss(trainer, held_out)
    return losses


def _mask_record(learned: LearnedScores, options: MaskOptions) -> dict[str, Any]:
    return {
        "losses": list(learned.losses),
        "seconds": learned.seconds,
        "learning_rate": options.resolved_learning_rate,
    }


def _to_ranking(
    updates: Sequence[Update],
    learned: LearnedScores,
    options: MaskOptions,
    provenance: dict[str, Any],
) -> Ranking:
    errors = learned.standard_errors or [None] * len(updates)
    modules = tuple(
        RankedModule(
            name=update.module.name,
            block_index=update.module.block_index,
            projection=update.module.projection,
            num_parameters=update.module.num_parameters,
            score=score,
            standard_error=error,
        )
        for update, score, error in zip(updates, learned.scores, errors, strict=True)
    )
    return Ranking(modules, METHOD, options.granularity, provenance)
