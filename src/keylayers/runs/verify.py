# SPDX-License-Identifier: Apache-2.0
"""Verify a ranking: its mask curve on held-out data, beside random orders and the reverse order."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer

from keylayers.curve import MaskCurve
from keylayers.errors import RankingError
from keylayers.mask.curve import mask_curve
from keylayers.models import describe, load_model, load_tokenizer, max_positions
from keylayers.options import (
    LOSS_UNITS,
    MaskOptions,
    TrainingOptions,
    UpdateOptions,
    VerifyOptions,
)
from keylayers.progress import Progress, Silent
from keylayers.ranking import Ranking
from keylayers.records import environment, json_sha256
from keylayers.runs.train import note_other_objective
from keylayers.runs.update import existing_update
from keylayers.scores import score_modules
from keylayers.selection import check_same_modules
from keylayers.training.data import PreparedData, prepare
from keylayers.training.objectives import held_out_of
from keylayers.training.run import make_loss_trainer
from keylayers.updates import Update
from keylayers.verification import Verification, verification_file
from keylayers.weights import weights_sha256

NUM_LEAVE_ONE_OUT_EXAMPLES = 64
ENOUGH_BATCHES = 20  # of held-out examples, to resample them for an interval


def verify(
    ranking: str | Path, options: VerifyOptions, progress: Progress | None = None
) -> Verification:
    """Measure the mask curve of a ranking, and write verification.json beside the ranking file.

    Nothing is trained. The held-out examples are those that neither stage 1 nor the scores saw, if
    the options of the ranking's own run are given; `keylayers verify` takes them over.

    Args:
        ranking: Ranking file, or the folder that holds ranking.json.
        options: Model, update and data, and how to measure.
        progress: Where to report to.

    Raises:
        KeylayersError: a bad option, ranking, model, update or data set; nothing is written then.
    """
    progress = progress or Silent()
    loaded = Ranking.load(ranking)
    job = _prepared(loaded, options, progress)
    order = [module.name for module in loaded.ordered()]
    curves = _Curves(job, options.curve.points, progress)
    best_first = curves.measure(order, "best first")
    worst_first = curves.measure(order[::-1], "worst first")
    seeds = [f"{options.curve.order_seed} {index}" for index in range(options.curve.random_orders)]
    found = Verification(
        ranking_sha256=json_sha256(loaded.to_json()),
        best_first=best_first,
        worst_first=worst_first,
        random=tuple(
            curves.measure(random.Random(seed).sample(order, len(order)), f"random order {number}")
            for number, seed in enumerate(seeds, start=1)
        ),
        leave_one_out=_leave_one_out(job, curves, progress)
        if options.curve.leave_one_out
        else None,
        margin=options.curve.margin,
        provenance={
            "environment": environment(),
            "model": job.model_record,
            "data": job.data.record(),
            "options": options.flat(),
            "loss_unit": LOSS_UNITS[options.objective.objective],
        },
    )
    found.save(verification_file(ranking))
    return found


@dataclass(frozen=True)
class _Job:
    trainer: Trainer
    updates: Sequence[Update]
    data: PreparedData
    model_record: dict[str, Any]


def _prepared(ranking: Ranking, options: VerifyOptions, progress: Progress) -> _Job:
    """Everything loaded and checked, before any long work."""
    objective = options.objective.objective
    tokenizer, model = load_tokenizer(options.model), load_model(options.model, objective)
    data = prepare(options.data, tokenizer, max_positions(model), objective)
    data.give_template(tokenizer)
    for line in data.summary():
        progress.note(line)
    record = describe(options.model, model) | {"weights_sha256": weights_sha256(model)}
    _note_other_inputs(ranking, record, data, progress)
    note_other_objective(ranking, objective, progress)
    if options.update == UpdateOptions():
        raise RankingError(
            "the update that was ranked must be there to be masked, but the ranking names none; "
            "give `adapter` or `tuned`"
        )
    tuned = existing_update(model, options.update, progress)
    parts = [ranking.provenance.get(kind, {}) for kind in ("stage_1", "adapter", "tuned")]
    ranked = {part.get("adapter_sha256", part.get("weights_sha256")) for part in parts} - {None}
    if ranked and ranked.isdisjoint(part["weights_sha256"] for part in tuned.record.values()):
        progress.note("the update is another one than was ranked")
    updated = {one.module.name: one.module.num_parameters for one in tuned.updates}
    check_same_modules(ranking, updated)
    if num_missing := len(updated.keys() - {module.name for module in ranking.modules}):
        raise RankingError(
            f"the ranking must hold every module of the update, but {num_missing} are missing in it"
        )
    batch_size = options.curve.eval_batch_size
    if (
        objective != "kto"
    ):  # whose loss compares the answers of a batch, and is another in each size
        batch_size = max(1, min(batch_size, len(data.held_out) // ENOUGH_BATCHES))
    training = TrainingOptions(**asdict(options.objective), batch_size=batch_size)
    trainer = make_loss_trainer(
        data, tuned.model, tokenizer, training, lambda: load_model(options.model, objective)
    )
    return _Job(trainer, tuned.updates, data, record)


def _note_other_inputs(
    ranking: Ranking, model: dict[str, Any], data: PreparedData, progress: Progress
) -> None:
    """Say what differs from the ranking's own run, where that is known."""
    made_by = ranking.provenance
    if (
        made_by.get("model", {}).get("weights_sha256", model["weights_sha256"])
        != (model["weights_sha256"])
    ):
        progress.note("the ranking was made on other weights of the same shapes")
    split = data.record()["split_sha256"]
    if made_by.get("data", {}).get("split_sha256", split) != split:
        progress.note(
            "other data or another split than the ranking's own: held-out examples may have been "
            "seen in training"
        )


class _Curves:
    """Curves of several orders at the same counts."""

    def __init__(self, job: _Job, points: int, progress: Progress) -> None:
        self.job = job
        self.points = min(points, len(job.updates) + 1)
        self.progress = progress

    def measure(self, order: Sequence[str], title: str) -> MaskCurve:
        with self.progress.stage(f"mask curve: {title}", self.points) as on_step:
            return mask_curve(
                self.job.trainer,
                self.job.updates,
                order,
                held_out_of(self.job.trainer),
                num_points=self.points,
                on_step=on_step,
            )


def _leave_one_out(job: _Job, curves: _Curves, progress: Progress) -> MaskCurve:
    batch_size = job.trainer.args.per_device_train_batch_size
    num_batches = -(-NUM_LEAVE_ONE_OUT_EXAMPLES // batch_size)
    options = MaskOptions(method="leave-one-out", mask_batches=num_batches)
    num_passes = (len(job.updates) + 1) * num_batches
    with progress.stage("scoring: leave-one-out", num_passes) as on_step:
        found = score_modules(job.trainer, job.updates, options, on_step)
    by_name = dict(zip(found.module_names, found.scores, strict=True))
    return curves.measure(sorted(by_name, key=lambda name: -by_name[name]), "leave-one-out")
