# SPDX-License-Identifier: Apache-2.0
"""Mask curve: the held-out loss when only the best k modules keep their update, not retrained.

The measure of a ranking: a good one reaches the loss of all updates with few modules. A random
order is the control.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import Trainer

from keylayers.gates import gated
from keylayers.mask.trainer_loss import TrainerLoss, mean_loss
from keylayers.updates import Update


@dataclass(frozen=True)
class MaskCurve:
    """Held-out loss against the number of modules that keep their update.

    Attributes:
        counts: How many of the best modules are kept, rising from 0 to all.
        losses: Held-out loss in nats with so many.
    """

    counts: tuple[int, ...]
    losses: tuple[float, ...]

    @property
    def normalised_area(self) -> float | None:
        """Area under the curve, "no update" mapped to 1 and "all updates" to 0; lower is better.

        Trapezoids over the fraction of modules. None where the update does not lower the held-out
        loss, because the map is undefined then.
        """
        gain = self.losses[0] - self.losses[-1]
        if gain <= 0:
            return None
        heights = [(loss - self.losses[-1]) / gain for loss in self.losses]
        area = sum(
            (right - left) * (low + high) / 2
            for left, right, low, high in zip(
                self.counts, self.counts[1:], heights, heights[1:], strict=False
            )
        )
        return area / self.counts[-1]


def mask_curve(
    trainer: Trainer,
    updates: Sequence[Update],
    order: Sequence[str],
    held_out: Dataset,
    *,
    num_points: int | None = None,
) -> MaskCurve:
    """The curve of one order of the modules.

    Args:
        trainer: Its model carries the updates; its loss is measured.
        updates: From `lora_updates` or `dense_updates`.
        order: Names of all updated modules, best first.
        held_out: Examples that neither training nor mask learning saw.
        num_points: Points on the curve, evenly spaced; every count if not given.
    """
    total = len(order)
    steps = total if num_points is None else min(total, num_points - 1)
    counts = [round(total * step / steps) for step in range(steps + 1)]
    subsets = [order[:count] for count in counts]
    return MaskCurve(tuple(counts), tuple(subset_losses(trainer, updates, subsets, held_out)))


def subset_losses(
    trainer: Trainer,
    updates: Sequence[Update],
    subsets: Sequence[Collection[str]],
    held_out: Dataset,
) -> list[float]:
    """Held-out loss in nats with only the updates of each subset of modules kept."""
    source = TrainerLoss(trainer)
    losses = []
    with source.quiet():
        batches = list(trainer.get_eval_dataloader(held_out))
        with gated(trainer.model, updates, initial_score=1.0, link="identity") as gates:
            names = [modules[0] for modules in gates.groups.values()]
            for subset in subsets:
                kept = set(subset)
                gates.set_scores(torch.tensor([float(name in kept) for name in names]))
                losses.append(mean_loss(source, batches))
    return losses
