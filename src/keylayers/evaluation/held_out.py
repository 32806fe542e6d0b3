# SPDX-License-Identifier: Apache-2.0
"""Held-out losses of a trainer's model: as it is, and with only the best k updates kept."""

from collections.abc import Collection, Sequence

import torch
from datasets import Dataset
from transformers import Trainer

from keylayers.gates import gated
from keylayers.progress import OnStep
from keylayers.ranking.verification import MaskCurve
from keylayers.trainers.data import prepared_for
from keylayers.trainers.loss import BatchLosses, TrainerLoss
from keylayers.updates import Update


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
    """The curve of one order of the modules.

    Args:
        trainer: Its model carries the updates; its loss is measured.
        updates: From `adapter_updates` or `dense_updates`.
        order: Names of all updated modules, best first.
        held_out: Examples that neither training nor mask learning saw.
        num_points: Points on the curve, evenly spaced; every count if not given.
        on_step: Called after each point with its number, from 1, and its loss in nats.
    """
    steps = len(order) if num_points is None else min(len(order), num_points - 1)
    counts = [round(len(order) * step / steps) for step in range(steps + 1)]
    subsets = [order[:count] for count in counts]
    measured = subset_losses(trainer, updates, subsets, held_out, on_step)
    return MaskCurve(
        counts=tuple(counts),
        losses=tuple(point.mean for point in measured),
        batch_losses=tuple(point.losses for point in measured),
        batch_weights=measured[0].weights,
    )


def subset_losses(
    trainer: Trainer,
    updates: Sequence[Update],
    subsets: Sequence[Collection[str]],
    held_out: Dataset,
    on_step: OnStep | None = None,
) -> list[BatchLosses]:
    """Held-out losses in nats with only the updates of each subset of modules kept."""
    source = TrainerLoss(trainer, sees_every_batch=True)
    held_out = prepared_for(trainer, held_out)
    measured = []
    with source.quiet():
        batches = list(trainer.get_eval_dataloader(held_out))
        with gated(trainer.model, updates, initial_score=1.0, link="identity") as gates:
            names = [modules[0] for modules in gates.groups.values()]
            for step, subset in enumerate(subsets, start=1):
                kept = set(subset)
                gates.set_scores(torch.tensor([float(name in kept) for name in names]))
                measured.append(source.held_out(batches))
                if on_step is not None:
                    on_step(step, measured[-1].mean)
    return measured
