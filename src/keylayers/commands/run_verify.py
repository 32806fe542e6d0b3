# SPDX-License-Identifier: Apache-2.0
"""A verification: the mask curve of a ranking, compared with random and reversed orders."""

import random
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pandas as pd
import torch
from transformers import Trainer

from keylayers.commands.options import VerifyOptions
from keylayers.commands.session import Session
from keylayers.evaluation.held_out import mask_curve
from keylayers.files import json_sha256, output_folder
from keylayers.gates import part_name
from keylayers.progress import Progress
from keylayers.ranking.parts import parts_in_order
from keylayers.ranking.ranking import FILE, Ranking
from keylayers.ranking.verification import MaskCurve, Verification, verification_file
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options
from keylayers.updates import Update

NUM_LEAVE_ONE_OUT_EXAMPLES = 64


def run_verify(
    ranking: Path, options: VerifyOptions, progress: Progress, output: Path | None = None
) -> Verification:
    """Measure the mask curve of a ranking, and write verification.json."""
    loaded = Ranking.load(ranking)
    with nullcontext() if output is None else output_folder(output):
        found = _verification(loaded, options, progress)
        if output is not None:
            loaded.save(output / FILE)
        found.save(verification_file(output or ranking))
    return found


def _verification(ranking: Ranking, options: VerifyOptions, progress: Progress) -> Verification:
    wanted = options.curve
    session = Session(options, options.objective, progress, ranking=ranking)
    tuned = session.open_update(options.update, ranking)
    trainer = session.loss_trainer(tuned.model, wanted.eval_batch_size)
    held_out = trainer.eval_dataset["held_out"]
    if ranking.is_of_parts:
        names = [part_name(own.name, i) for own in ranking.modules for i in range(own.num_parts)]
        best_first = [part_name(p.module_name, p.index) for p in parts_in_order(ranking.modules)]
        rivals = orders_by_singular_values(tuned.updates)
    else:
        names = [module.name for module in ranking.modules]  # the same orders for every ranking
        best_first, rivals = [module.name for module in ranking.ordered()], {}
    num_points = min(wanted.points, len(names) + 1)

    def measure(title: str, order: Sequence[str]) -> MaskCurve:
        with progress.stage(f"mask curve: {title}", num_points) as on_step:
            return mask_curve(
                trainer, tuned.updates, order, held_out, num_points=num_points, on_step=on_step
            )

    return Verification(
        ranking_sha256=json_sha256(ranking.to_json()),
        best_first=measure("best first", best_first),
        worst_first=measure("worst first", best_first[::-1]),
        random=tuple(
            measure(
                f"random order {index + 1}",
                random.Random(f"{wanted.order_seed} {index}").sample(names, len(names)),
            )
            for index in range(wanted.random_orders)
        ),
        leave_one_out=(
            measure("leave-one-out", _leave_one_out_order(trainer, tuned.updates, progress))
            if wanted.leave_one_out
            else None
        ),
        rivals={title: measure(title, order) for title, order in rivals.items()},
        margin=wanted.margin,
        provenance=session.record | tuned.record,
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
