# SPDX-License-Identifier: Apache-2.0
"""Verify a ranking: its mask curve, next to random orders, the reverse order and known rules."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer

from keylayers.errors import RankingError
from keylayers.evaluation.held_out import mask_curve
from keylayers.evaluation.options import CurveOptions
from keylayers.files import json_sha256
from keylayers.gates import part_name
from keylayers.model.preserve import preserved
from keylayers.model.sharding import place_model
from keylayers.progress import Progress
from keylayers.ranking.parts import parts_in_order
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.verification import MaskCurve, Verification
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options
from keylayers.trainers.data import loss_unit, prepared_for
from keylayers.trainers.loss import TrainerLoss
from keylayers.training.rank_modules import trainer_record
from keylayers.updates import Update, trained_updates

NUM_LEAVE_ONE_OUT_EXAMPLES = 64


def verify_ranking(
    trainer: Trainer,
    ranking: Ranking,
    held_out: Dataset,
    *,
    base_weights: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Verification:
    """Measure the mask curve of a ranking of a trainer's fine-tune, and its controls.

    As `keylayers verify` for a trainer that you built. Trainer and model are the same afterwards
    as before.

    Args:
        trainer: Its `model` carries the LoRA adapter that was ranked, or was fine-tuned as a whole.
        ranking: A ranking of the modules, or rank-one parts, of that fine-tune.
        held_out: Examples that neither training nor ranking saw, in the same format as the
            `mask_dataset` of `rank_modules`.
        base_weights: After a full fine-tune, the modules' weights before it, as in `rank_modules`.
        **options: Fields of `CurveOptions`, for example `points=8` or `random_orders=10`.

    Raises:
        TypeError: no such option.
        ConfigError: an option is out of range, or the trainer samples its own data (GRPO).
        DataError: `held_out` lacks what the trainer reads.
        RankingError: the ranking is of other modules or parts than the update.
    """
    wanted = CurveOptions(**options)
    held_out = prepared_for(trainer, held_out)
    record = trainer_record(trainer)
    place_model(trainer)
    source = TrainerLoss(trainer, sees_every_batch=True)
    with preserved(trainer.model), trained_updates(trainer.model, base_weights) as updates:
        check_same_update(ranking, updates)
        with source.quiet():
            unit = loss_unit(next(iter(trainer.get_eval_dataloader(held_out))))
        record |= {"options": asdict(wanted), "loss_unit": unit}
        return measured_curves(trainer, updates, ranking, held_out, wanted, record, Progress())


def measured_curves(
    trainer: Trainer,
    updates: Sequence[Update],
    ranking: Ranking,
    held_out: Dataset,
    options: CurveOptions,
    record: Mapping[str, Any],
    progress: Progress,
) -> Verification:
    """The verification of a ranking of these updates; `record` says what was measured on."""
    if ranking.is_of_parts:
        names = [part_name(own.name, i) for own in ranking.modules for i in range(own.num_parts)]
        best_first = [part_name(p.module_name, p.index) for p in parts_in_order(ranking.modules)]
        rivals = orders_by_singular_values(updates)
    else:
        names = [module.name for module in ranking.modules]  # the same orders for every ranking
        best_first, rivals = [module.name for module in ranking.ordered()], {}
    num_points = min(options.points, len(names) + 1)

    def measure(title: str, order: Sequence[str]) -> MaskCurve:
        with progress.stage(f"mask curve: {title}", num_points) as on_step:
            return mask_curve(
                trainer, updates, order, held_out, num_points=num_points, on_step=on_step
            )

    return Verification(
        ranking_sha256=json_sha256(ranking.to_json()),
        best_first=measure("best first", best_first),
        worst_first=measure("worst first", best_first[::-1]),
        random=tuple(
            measure(
                f"random order {index + 1}",
                random.Random(f"{options.order_seed} {index}").sample(names, len(names)),
            )
            for index in range(options.random_orders)
        ),
        leave_one_out=(
            measure("leave-one-out", _leave_one_out_order(trainer, updates, progress))
            if options.leave_one_out
            else None
        ),
        rivals={title: measure(title, order) for title, order in rivals.items()},
        margin=options.margin,
        provenance=dict(record),
    )


def _leave_one_out_order(
    trainer: Trainer, updates: Sequence[Update], progress: Progress
) -> list[str]:
    """The modules, best first, by leave-one-out on a few batches of the mask's examples."""
    num_batches = -(-NUM_LEAVE_ONE_OUT_EXAMPLES // trainer.args.per_device_train_batch_size)
    options = scoring_options("leave-one-out", mask_batches=num_batches)
    num_passes = (len(updates) + 1) * num_batches
    with progress.stage("scoring: leave-one-out", num_passes) as on_step:
        found = score_modules(trainer, updates, options, on_step)
    by_name = dict(zip(found.module_names, found.scores, strict=True))
    return sorted(by_name, key=lambda name: -by_name[name])


def orders_by_singular_values(updates: Sequence[Update]) -> dict[str, list[str]]:
    """Name of a rule by singular values alone -> all rank-one parts, best first.

    Other tools cut a LoRA by these rules. They need no data, so a ranking of parts must be better.
    `uniform rank`: the same rank in every module (mergekit's extraction, PEFT's and kohya's
    resizing to a rank). `singular value`: the largest of all modules. `energy per parameter`: its
    square by the part's size. `share of energy` and `ratio to the largest`: the rank at which a
    module keeps a share of its squared norm, or drops values below a ratio (kohya's `sv_fro` and
    `sv_ratio`).
    """
    parts = []
    for update in updates:
        basis, tiny = update.parts, torch.finfo(torch.float64).tiny
        values = basis.singular_values.double().cpu()
        energy = values.square() / values.square().sum().clamp(min=tiny)
        own = {
            "uniform rank": torch.arange(len(values)) - 0.5 * energy,  # ties go to the dominant
            "singular value": -values,
            "energy per parameter": -values.square() / torch.tensor(basis.num_parameters),
            "share of energy": energy.cumsum(0) - energy,  # what the parts before it keep
            "ratio to the largest": -values / values.max().clamp(min=tiny),
        }
        names = [part_name(update.module.name, place) for place in range(len(values))]
        parts.append(pd.DataFrame({rule: key.numpy() for rule, key in own.items()}, names))
    table = pd.concat(parts)
    return {rule: list(table[rule].sort_values(kind="stable").index) for rule in table}


def check_same_update(ranking: Ranking, updates: Sequence[Update]) -> None:
    """Refuse an update of more or of fewer modules than were ranked, or of other parts."""
    names = [module.name for module in ranking.modules]
    updated = {update.module.name for update in updates}
    absent = [name for name in names if name not in updated]
    if absent:
        raise RankingError(
            f"the update must be of every module of the ranking, but {len(absent)} of {len(names)} "
            f"are not updated, first {absent[0]}; give the update that was ranked, or rank this one"
        )
    unranked = [name for name in updated if name not in names]
    if unranked:
        raise RankingError(
            f"the ranking must hold every module of the update, but {len(unranked)} are missing in "
            f"it, first {min(unranked)}; rank this update"
        )
    if ranking.granularity != "part":
        return
    ranked = {module.name: list(module.part_parameters or ()) for module in ranking.modules}
    for update in updates:
        name, sizes = update.module.name, list(update.parts.num_parameters)
        if sizes != ranked[name]:
            raise RankingError(
                f"the update must have the rank-one parts that were ranked, but {name} has "
                f"{len(sizes)} with {sum(sizes):,} parameters, and in the ranking "
                f"{len(ranked[name])} with {sum(ranked[name]):,}; give the update that was "
                f"ranked, or rank this one"
            )
