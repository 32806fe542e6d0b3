# SPDX-License-Identifier: Apache-2.0
"""Held-out losses of a trainer's model: as it is, and with only the best updates kept."""

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer

from keylayers.gates import gated, part_sizes
from keylayers.progress import OnStep
from keylayers.ranking.verification import MaskCurve
from keylayers.scores.options import Granularity
from keylayers.trainers.data import prepared_for
from keylayers.trainers.loss import BatchLosses, TrainerLoss
from keylayers.updates import Update

MaskedLoss = Callable[[Collection[str] | None], BatchLosses]


def held_out_loss(trainer: Trainer, dataset: Dataset) -> float:
    """The trainer's own loss on `dataset`: in nats, averaged over all labelled tokens of the set.

    A loss of rows or pairs (DPO, KTO, reward) is averaged over all of these instead. The model runs
    in evaluation mode and gets its mode back; the trainer keeps its metrics.
    """
    source = TrainerLoss(trainer, sees_every_batch=True)
    dataset = prepared_for(trainer, dataset)
    with source.quiet():
        return source.held_out(list(trainer.get_eval_dataloader(dataset))).mean


def mask_curve(
    trainer: Trainer,
    updates: Sequence[Update],
    order: Sequence[str],
    held_out: Dataset,
    *,
    num_points: int | None = None,
    on_step: OnStep | None = None,
) -> MaskCurve:
    """The curve of one order of the modules, or of the rank-one parts of the updates.

    Args:
        trainer: Its model carries the updates; its loss is measured.
        updates: From `adapter_updates` or `dense_updates`.
        order: Names of all updated modules, best first, or of all parts (`keylayers.gates`).
        held_out: Examples that neither training nor mask learning saw.
        num_points: Points on the curve; every count if not given. Modules are spaced evenly, parts
            by equal factors of their parameters, from a hundredth of all.
        on_step: Called after each point with its number, from 1, and its loss in nats.
    """
    sizes: dict[str, int] = {}
    if order and order[0] not in {update.module.name for update in updates}:
        sizes = part_sizes(updates)
    held = list(accumulate((sizes[name] for name in order if sizes), initial=0))
    steps = len(order) if num_points is None else min(len(order), num_points - 1)
    if sizes and steps < len(order):
        budgets = np.geomspace(held[-1] / 100, held[-1], steps) * (1 + 1e-12)
        counts = [0, *(max(1, bisect_right(held, budget) - 1) for budget in budgets)]
    else:
        counts = [round(len(order) * step / steps) for step in range(steps + 1)]
    measured = []
    with masked_losses(trainer, updates, held_out, "part" if sizes else "module") as loss:
        for step, count in enumerate(counts, start=1):
            measured.append(loss(order[:count]))
            if on_step is not None:
                on_step(step, measured[-1].mean)
    return MaskCurve(
        counts=tuple(counts),
        losses=tuple(point.mean for point in measured),
        batch_losses=tuple(point.losses for point in measured),
        batch_weights=measured[0].weights,
        num_parameters=tuple(held[count] for count in counts) if sizes else (),
    )


@contextmanager
def masked_losses(
    trainer: Trainer,
    updates: Sequence[Update],
    held_out: Dataset,
    granularity: Granularity = "module",
) -> Iterator[MaskedLoss]:
    """Inside the block, a function that gives held-out losses in nats at any mask.

    It takes the names of the modules, or rank-one parts, whose updates are kept; None keeps all.
    """
    source = TrainerLoss(trainer, sees_every_batch=True)
    held_out = prepared_for(trainer, held_out)
    with source.quiet():
        batches = list(trainer.get_eval_dataloader(held_out))
        with gated(
            trainer.model, updates, initial_score=1.0, link="identity", granularity=granularity
        ) as gates:

            def loss(names: Collection[str] | None) -> BatchLosses:
                kept = set(gates.groups if names is None else names)
                gates.set_scores(torch.tensor([float(name in kept) for name in gates.groups]))
                return source.held_out(batches)

            yield loss


def smallest_within(
    loss: MaskedLoss,
    kept: Callable[[int], Collection[str]],
    num_candidates: int,
    margin_nats: float,
    on_step: OnStep,
) -> MaskCurve:
    """The curve at the counts that a bisection looks at, for the smallest within the margin.

    `kept` gives the names of the best modules or parts of a count, whose loss `loss` measures. It
    should fall as more are kept: where it does not, a smaller count may be within the margin too.
    """
    found: dict[int, BatchLosses] = {}

    def measure(count: int) -> None:
        found[count] = loss(kept(count) if count else [])
        on_step(len(found), found[count].mean)

    def curve(counts: Iterable[int]) -> MaskCurve:
        points = {count: found[count] for count in sorted(counts)}
        return MaskCurve(
            counts=tuple(points),
            losses=tuple(point.mean for point in points.values()),
            batch_losses=tuple(point.losses for point in points.values()),
            batch_weights=found[0].weights,
        )

    measure(0)
    measure(num_candidates)
    low, high = 0, num_candidates
    while high - low > 1:
        middle = (low + high) // 2
        measure(middle)
        best = curve((0, middle, num_candidates)).smallest_within(margin_nats)
        low, high = (low, middle) if best.num_modules == middle else (middle, high)
    return curve(found)
