# SPDX-License-Identifier: Apache-2.0
"""A mask curve: held-out loss against the number of modules that keep their update. Needs no torch.

The measure of a ranking: a good one reaches the loss of all updates with few modules. Nothing is
retrained. `keylayers.evaluation.held_out` measures it.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import scipy  # loads `scipy.stats` when it is first used
from pydantic import Field, model_validator

from keylayers.validation import ListOf, Part

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Recommendation:
    """The smallest budget that is nearly as good as all modules, and how sure that is."""

    num_modules: int  # of the best modules
    margin_nats: float  # how much worse than all modules it may be
    difference_nats: float  # its held-out loss minus that of all modules
    # The difference is below this with 95 % confidence, by resampling the held-out batches in
    # pairs. The confidence holds for a single budget chosen in advance.
    upper_nats: float


class MaskCurve(Part):
    """Held-out loss against the number of modules that keep their update."""

    counts: ListOf[int]  # of the best modules that are kept, rising from 0 to all
    losses: ListOf[float]  # in nats, for each count
    # For each count, the loss of each held-out batch, and the batches' weights in the mean.
    batch_losses: ListOf[ListOf[float]] = Field(default=(), repr=False)
    batch_weights: ListOf[float] = Field(default=(), repr=False)

    @model_validator(mode="after")
    def _has_a_loss_for_each_count(self) -> "MaskCurve":
        if self.counts[:1] != (0,) or any(low >= high for low, high in pairwise(self.counts)):
            raise ValueError(f"a curve whose counts rise from 0, not {self.counts[:9]}")
        if len(self.counts) < 2 or len(self.losses) != len(self.counts):
            raise ValueError(f"a curve with a loss for each of its {len(self.counts)} counts")
        num_rows = len(self.counts) if self.batch_weights else 0
        sizes = {len(row) for row in self.batch_losses}
        if len(self.batch_losses) != num_rows or sizes - {len(self.batch_weights)}:
            raise ValueError(f"a curve with a loss for each of {len(self.batch_weights)} batches")
        return self

    @property
    def reduction_nats(self) -> float:
        """How much all updates together lower the held-out loss; negative if they raise it."""
        return self.losses[0] - self.losses[-1]

    @property
    def normalised_area(self) -> float | None:
        """Area under the curve, "no update" mapped to 1 and "all updates" to 0; lower is better.

        Trapezoids over the fraction of modules. None where the update does not lower the held-out
        loss, because the map is undefined then.
        """
        if self.reduction_nats <= 0:
            return None
        heights = [(loss - self.losses[-1]) / self.reduction_nats for loss in self.losses]
        points = pairwise(zip(self.counts, heights, strict=True))
        area = sum((right - left) * (low + high) / 2 for (left, low), (right, high) in points)
        return area / self.counts[-1]

    @property
    def best(self) -> tuple[int, float]:
        """The count with the lowest held-out loss (the smallest such), and that loss in nats.

        The minimum of noisy numbers is too good by chance; a point well below the end of the curve
        means that some updates hurt.
        """
        index = self.losses.index(min(self.losses))
        return self.counts[index], self.losses[index]

    def smallest_within(self, margin_nats: float) -> Recommendation:
        """The smallest budget that is surely within `margin_nats` of all modules.

        All modules always are, so there is one. Without several held-out batches nothing is known
        about the uncertainty and the difference itself is taken.
        """
        for index in range(1, len(self.counts)):
            difference = self.losses[index] - self.losses[-1]
            upper = self._upper_limit(index) if difference <= margin_nats else math.inf
            if upper <= margin_nats:
                break
        return Recommendation(self.counts[index], margin_nats, difference, upper)

    def _upper_limit(self, index: int) -> float:
        """One-sided upper limit of the loss at `index` minus that at the end, in nats."""
        point = self.losses[index] - self.losses[-1]
        if len(self.batch_weights) < 2:
            return point
        differences = np.array(self.batch_losses[index]) - np.array(self.batch_losses[-1])
        if np.ptp(differences) == 0:
            return point
        resampled = scipy.stats.bootstrap(
            (differences, np.array(self.batch_weights)),
            _weighted_mean,
            paired=True,
            vectorized=True,
            confidence_level=CONFIDENCE,
            alternative="less",
            method="percentile",
            rng=np.random.default_rng(0),
        )
        return float(resampled.confidence_interval.high)

    def to_json(self) -> dict[str, Any]:
        """The curve for a record."""
        best_count, best_loss = self.best
        return self.model_dump() | {
            "normalised_area": self.normalised_area,
            "best": {"num_modules": best_count, "loss_nats": best_loss},
        }


def _weighted_mean(values: Any, weights: Any, axis: int = -1) -> Any:
    return (values * weights).sum(axis=axis) / weights.sum(axis=axis)
