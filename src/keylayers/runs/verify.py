# SPDX-License-Identifier: Apache-2.0
"""Verify a ranking: its mask curve on held-out data, beside random orders and the reverse order."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import Trainer

from keylayers.commands.run_options import VerifyOptions
from keylayers.data.prepare import PreparedData
from keylayers.environment import environment
from keylayers.evaluation.mask_curve import mask_curve
from keylayers.files import json_sha256, output_folder
from keylayers.progress import Progress, Silent
from keylayers.ranking.curve import MaskCurve
from keylayers.ranking.ranking import FILE, Ranking
from keylayers.ranking.verification import Verification, verification_file
from keylayers.runs.reopen import loss_trainer, reopen
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options
from keylayers.training.objectives import prepared_examples
from keylayers.training.options import LOSS_UNITS
from keylayers.updates import Update

NUM_LEAVE_ONE_OUT_EXAMPLES = 64


def verify(
    ranking: str | Path,
    options: VerifyOptions,
    progress: Progress | None = None,
    *,
    output: Path | None = None,
) -> Verification:
    """Measure the mask curve of a ranking, and write verification.json beside the ranking file.

    Nothing is trained. The held-out examples are those that neither stage 1 nor the scores saw, if
    the options of the ranking's own run are given; `keylayers verify` takes them over.

    Args:
        ranking: Ranking file, or the folder that holds ranking.json.
        options: Model, update and data, and how to measure.
        progress: Where to report to.
        output: Folder for verification.json and a copy of the ranking, instead of beside it.

    Raises:
        KeylayersError: a bad option, ranking, model, update, data set or output; nothing is written
            then.
    """
    progress = progress or Silent()
    loaded = Ranking.load(ranking)
    if output is None:
        found = _verification(loaded, options, progress)
        found.save(verification_file(ranking))
        return found
    with output_folder(output):
        found = _verification(loaded, options, progress)
        loaded.save(output / FILE)
        found.save(verification_file(output))
    return found


def _verification(loaded: Ranking, options: VerifyOptions, progress: Progress) -> Verification:
    opened = reopen(loaded, options, progress)
    tuned, batch_size = opened.tuned, options.curve.eval_batch_size
    trainer = loss_trainer(tuned.model, opened.tokenizer, opened.data, batch_size, options)
    job = _Job(trainer, tuned.updates, opened.data)
    order = [module.name for module in loaded.ordered()]
    curves = _Curves(job, options.curve.points, progress)
    best_first = curves.measure(order, "best first")
    worst_first = curves.measure(order[::-1], "worst first")
    names = [module.name for module in loaded.modules]  # the same orders whatever the ranking
    seeds = [f"{options.curve.order_seed} {index}" for index in range(options.curve.random_orders)]
    return Verification(
        ranking_sha256=json_sha256(loaded.to_json()),
        best_first=best_first,
        worst_first=worst_first,
        random=tuple(
            curves.measure(random.Random(seed).sample(names, len(names)), f"random order {number}")
            for number, seed in enumerate(seeds, start=1)
        ),
        leave_one_out=_leave_one_out(job, curves, progress)
        if options.curve.leave_one_out
        else None,
        margin=options.curve.margin,
        provenance={
            "environment": environment(),
            "model": opened.model_record,
            "data": job.data.record(),
            **tuned.record,
            "options": options.flat(),
            "loss_unit": LOSS_UNITS[options.objective.objective],
        },
    )


@dataclass(frozen=True)
class _Job:
    trainer: Trainer
    updates: Sequence[Update]
    data: PreparedData


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
                prepared_examples(self.job.trainer)["held_out"],
                num_points=self.points,
                on_step=on_step,
            )


def _leave_one_out(job: _Job, curves: _Curves, progress: Progress) -> MaskCurve:
    batch_size = job.trainer.args.per_device_train_batch_size
    num_batches = -(-NUM_LEAVE_ONE_OUT_EXAMPLES // batch_size)
    options = scoring_options("leave-one-out", mask_batches=num_batches)
    num_passes = (len(job.updates) + 1) * num_batches
    with progress.stage("scoring: leave-one-out", num_passes) as on_step:
        found = score_modules(job.trainer, job.updates, options, on_step)
    by_name = dict(zip(found.module_names, found.scores, strict=True))
    return curves.measure(sorted(by_name, key=lambda name: -by_name[name]), "leave-one-out")
