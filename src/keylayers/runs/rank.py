# SPDX-License-Identifier: Apache-2.0
"""Rank the modules of a model for a fine-tune.

Three ways in: a model and data (stage 1 fine-tunes, stage 2 learns the scores), an adapter that
exists already, and a second checkpoint. The last two need stage 2 only.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import Trainer

from keylayers.commands.run_options import RankOptions
from keylayers.data.prepare import prepare
from keylayers.environment import environment
from keylayers.evaluation.loss import held_out_loss
from keylayers.files import check_replaceable, output_folder
from keylayers.gates import gated, group_modules
from keylayers.model.loading import describe, load_tokenizer, max_positions
from keylayers.model.options import UpdateOptions
from keylayers.model.sharding import place_model
from keylayers.model.weights import weights_sha256
from keylayers.options import MaskOptions
from keylayers.options.passes import STOPS_BY_ITSELF, num_steps
from keylayers.progress import OnStep, Progress, Silent
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import FILE, Ranking
from keylayers.runs.stage_1 import from_stage_1, stage_1_folder
from keylayers.runs.update import RankJob, TunedModel, existing_update, load_base
from keylayers.scores import score_modules
from keylayers.scores.module_scores import ModuleScores
from keylayers.trainers.data import prepared_for
from keylayers.trainers.reference import reference_of
from keylayers.training.objectives import prepared_examples
from keylayers.training.options import LOSS_UNITS
from keylayers.training.run import make_loss_trainer
from keylayers.updates import AdaLoraUpdate, Update, adapter_updates, dense_updates
from keylayers.updates.dense import back_at_base


def rank_modules(
    trainer: Trainer,
    options: MaskOptions | None = None,
    on_step: OnStep | None = None,
    *,
    mask_dataset: Dataset | None = None,
    base_weights: Mapping[str, Tensor] | None = None,
) -> Ranking:
    """Rank the modules that a trainer's fine-tune updated, by its own loss and data.

    The trainer is one that you built and trained: TRL's or transformers' own (SFT, DPO, KTO, ORPO,
    reward, GRPO), or a subclass with its own loss. It and its model are given back as they were.
    docs/objectives.md has what holds for each.

    Args:
        trainer: Its `model` carries a LoRA adapter, or was fine-tuned as a whole.
        options: How to score.
        on_step: Called after each pass with its number, from 1, and its loss in nats.
        mask_dataset: Examples to score on, best such that training did not see, in the format that
            the trainer was built with or that of its `train_dataset` (SFT, DPO, KTO, reward: their
            own code prepares them; ORPO and other trainers: only the latter). Not given: the
            `train_dataset` itself.
        base_weights: After a full fine-tune: what the modules held before, by parameter name, from
            `keylayers.module_weights(model)` or a checkpoint.

    Raises:
        ConfigError: the trainer samples its own data (GRPO) and the method compares losses, or its
            reference model is the update itself.
        DataError: `mask_dataset` lacks what the trainer reads.
        ModelError: the model carries no update that gates can scale.
        LossError: the loss became NaN or infinite.
        GuardError: something else than the gates changed, or a gate took no part.
    """
    options = options or MaskOptions()
    model = trainer.model
    train_dataset = trainer.train_dataset
    if mask_dataset is not None:
        trainer.train_dataset = prepared_for(trainer, mask_dataset)
    reference = reference_of(trainer)
    place_model(trainer)
    updates: Sequence[Update]
    try:
        if base_weights is None:
            updates = adapter_updates(model)
            learned = score_modules(trainer, updates, options, on_step)
        else:
            with back_at_base(model, base_weights) as tuned:
                updates = dense_updates(model, tuned)
                learned = score_modules(trainer, updates, options, on_step)
    finally:
        trainer.train_dataset = train_dataset
    provenance = {
        "environment": environment(),
        "model": {
            "name": trainer.model.config._name_or_path,
            "model_type": trainer.model.config.model_type,
            "weights_sha256": weights_sha256(trainer.model),
        },
        "trainer": type(trainer).__name__,
        "reference": reference,
        "has_mask_dataset": mask_dataset is not None,
        "seed": trainer.args.seed if options.mask_seed is None else options.mask_seed,
        "options": asdict(options),
        "mask": _mask_record(learned, options),
    } | _adalora_record(updates)
    return _to_ranking(updates, learned, options, provenance)


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
        num_gates = len(group_modules(modules, options.mask.granularity))
        total = num_steps(options.mask, num_gates)
        with job.progress.stage("stage 2: scoring modules", total) as on_step:
            learned = score_modules(trainer, update.updates, options.mask, on_step)
        provenance["mask"] = _mask_record(learned, options.mask)
        provenance |= _adalora_record(update.updates)
        provenance["seconds"] = {
            "stage_1": update.record.get("stage_1", {}).get("seconds", 0.0),
            "stage_2": learned.seconds,
            "total": time.perf_counter() - start,
        }
        ranking = _to_ranking(update.updates, learned, options.mask, provenance)
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


def _mask_record(learned: ModuleScores, options: MaskOptions) -> dict[str, Any]:
    record: dict[str, Any] = {
        "losses": list(learned.losses),
        "seconds": learned.seconds,
        "score_unit": learned.unit,
        "num_forward": learned.num_forward,
        "num_backward": learned.num_backward,
    }
    if options.method in STOPS_BY_ITSELF:
        record["learning_rate"] = options.resolved_learning_rate
    return record | dict(learned.findings)


def _adalora_record(updates: Sequence[Update]) -> dict[str, Any]:
    """What AdaLoRA's own importance thinks of the modules, to be seen beside the scores."""
    ranks = {one.module.name: one.ranks_left() for one in updates if isinstance(one, AdaLoraUpdate)}
    return {"adalora_ranks_left": ranks} if ranks else {}


def _to_ranking(
    updates: Sequence[Update],
    learned: ModuleScores,
    options: MaskOptions,
    provenance: dict[str, Any],
) -> Ranking:
    errors = learned.standard_errors or [None] * len(updates)
    modules = tuple(
        RankedModule.of(update.module, score, error)
        for update, score, error in zip(updates, learned.scores, errors, strict=True)
    )
    return Ranking(modules, options.method, options.granularity, provenance)
