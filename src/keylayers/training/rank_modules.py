# SPDX-License-Identifier: Apache-2.0
"""Rank the modules of anyone's trainer, from Python."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import Trainer

from keylayers.environment import environment
from keylayers.model.sharding import is_sharded, place_model
from keylayers.model.weights import weights_sha256
from keylayers.progress import OnStep
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import ScoringOptions, scoring_options
from keylayers.scores.task import ModuleScores
from keylayers.trainers.data import prepared_for
from keylayers.trainers.loss import reference_of
from keylayers.updates import ZERO, AdaLoraUpdate, Update, are_zero, trained_updates
from keylayers.updates.dora import DoraUpdate


def rank_modules(
    trainer: Trainer,
    method: str | ScoringOptions = "elimination",
    *,
    mask_dataset: Dataset | None = None,
    base_weights: Mapping[str, Tensor] | None = None,
    on_step: OnStep | None = None,
    mask_seed: int | None = None,
    **options: Any,
) -> Ranking:
    """Rank the modules that a trainer's fine-tune updated, by its own loss and data.

    Works with a trainer that you built and trained: one of TRL or transformers (SFT, DPO, KTO,
    ORPO, reward, GRPO; docs/objectives.md), or a subclass with its own loss. Trainer and model are
    the same afterwards as before.

    Args:
        trainer: Its `model` carries a LoRA adapter, or was fine-tuned as a whole.
        method: Name of the scoring method (docs/methods.md).
        mask_dataset: Examples to score on, preferably not trained on. SFT, DPO, KTO and reward
            trainers prepare them if they have the format that the trainer was built with; others
            need the format of the `train_dataset`. Default: the `train_dataset` itself.
        base_weights: After a full fine-tune, the modules' weights before it by parameter name, from
            `keylayers.module_weights(model)` or a checkpoint.
        on_step: Called after each pass with its number, from 1, and its loss in nats.
        mask_seed: Seed of the order of the batches. Default: the trainer's seed.
        **options: Options of the method, for example `mask_batches=8`.

    Raises:
        ConfigError: no such method or option; the trainer samples its own data (GRPO) and the
            method compares losses; or its reference model is the update itself.
        DataError: `mask_dataset` lacks what the trainer reads.
        ModelError: the model carries no update that gates can scale.
        LossError: the loss became NaN or infinite.
        GuardError: something other than the gates changed, or a gate took no part.
    """
    scoring = scoring_options(method, mask_seed=mask_seed, **options)
    model = trainer.model
    train_dataset = trainer.train_dataset
    if mask_dataset is not None:
        trainer.train_dataset = prepared_for(trainer, mask_dataset)
    reference = reference_of(trainer)
    place_model(trainer)
    try:
        with trained_updates(model, base_weights) as updates:
            if not is_sharded(model) and are_zero(updates):
                warnings.warn(ZERO, UserWarning, stacklevel=2)
            found = score_modules(trainer, updates, scoring, on_step)
    finally:
        trainer.train_dataset = train_dataset
    provenance = {
        **trainer_record(trainer),
        "reference": reference,
        "has_mask_dataset": mask_dataset is not None,
        "seed": trainer.args.seed if scoring.mask_seed is None else scoring.mask_seed,
        "options": scoring.flat(),
    }
    return to_ranking(updates, found, scoring, provenance)


def trainer_record(trainer: Trainer) -> dict[str, Any]:
    """What a record says of a trainer that the user built."""
    return {
        "environment": environment(),
        "model": {
            "name": trainer.model.config._name_or_path,
            "model_type": trainer.model.config.model_type,
            "weights_sha256": weights_sha256(trainer.model),
        },
        "trainer": type(trainer).__name__,
    }


def to_ranking(
    updates: Sequence[Update],
    found: ModuleScores,
    scoring: ScoringOptions,
    provenance: Mapping[str, Any],
) -> Ranking:
    """The scores as a ranking; its record says how they were found, and what ranks AdaLoRA left."""
    mask = {
        "losses": list(found.losses),
        "seconds": found.seconds,
        "score_unit": found.unit,
        "num_forward": found.num_forward,
        "num_backward": found.num_backward,
        **found.findings,
    }
    adalora = [update for update in updates if isinstance(update, AdaLoraUpdate)]
    ranks = {update.module.name: update.ranks_left() for update in adalora}
    record = {**provenance, "mask": mask} | ({"adalora_ranks_left": ranks} if ranks else {})
    modules = [update.module for update in updates]
    errors = found.standard_errors or [None] * len(updates)
    ranked = tuple(map(RankedModule.of, modules, found.scores, errors))
    if found.parts is not None:
        ranked = tuple(
            replace(
                module,
                part_scores=parts.scores,
                part_parameters=parts.num_parameters,
                has_magnitude_part=isinstance(update, DoraUpdate),
            )
            for module, parts, update in zip(ranked, found.parts, updates, strict=True)
        )
    return Ranking(ranked, scoring.method, scoring.granularity, record)
