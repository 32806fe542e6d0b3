# SPDX-License-Identifier: Apache-2.0
"""What `keylayers verify` finds: a ranking's mask curve and its controls. Needs no torch.

A mask curve is the held-out loss against the number of modules (or rank-one parts) that keep their
update: a good ranking reaches the loss of all updates with few of them. Nothing is retrained.
`keylayers.evaluation.held_out` measures it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

import numpy as np
import scipy  # loads `scipy.stats` when it is first used
from pydantic import Field, model_serializer, model_validator

from keylayers.errors import ConfigError, RankingError
from keylayers.files import json_sha256, write_json
from keylayers.ranking.budget import Count
from keylayers.ranking.differences import are_same
from keylayers.ranking.ranking import FILE as RANKING
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import MadeBy
from keylayers.validation import ListOf, Part, Text, read_part

FILE = "verification.json"
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
    # Parameters of an adapter with each count of the best parts, if rank-one parts are ranked.
    num_parameters: ListOf[int] = ()

    @model_validator(mode="after")
    def _has_a_loss_for_each_count(self) -> "MaskCurve":
        steps = [high - low for low, high in pairwise(self.counts)]
        if self.counts[:1] != (0,) or min(steps, default=1) < (0 if self.num_parameters else 1):
            raise ValueError(f"a curve whose counts rise from 0, not {self.counts[:9]}")
        if len(self.counts) < 2 or len(self.losses) != len(self.counts):
            raise ValueError(f"a curve with a loss for each of its {len(self.counts)} counts")
        num_rows = len(self.counts) if self.batch_weights else 0
        sizes = {len(row) for row in self.batch_losses}
        if len(self.batch_losses) != num_rows or sizes - {len(self.batch_weights)}:
            raise ValueError(f"a curve with a loss for each of {len(self.batch_weights)} batches")
        if len(self.num_parameters) not in (0, len(self.counts)):
            raise ValueError(f"a curve with parameters for each of its {len(self.counts)} counts")
        return self

    @property
    def reduction_nats(self) -> float:
        """How much all updates together lower the held-out loss; negative if they raise it."""
        return self.losses[0] - self.losses[-1]

    @property
    def normalised_area(self) -> float | None:
        """Area under the curve, by trapezoids, "no update" mapped to 1 and "all updates" to 0.

        Lower is better. Of rank-one parts, the area is over the logarithm of their parameters, from
        the first count above 0. None where the update does not lower the held-out loss.
        """
        if self.reduction_nats <= 0:
            return None
        heights = [(loss - self.losses[-1]) / self.reduction_nats for loss in self.losses]
        places: Sequence[float] = self.counts
        if self.num_parameters:
            places, heights = [math.log(size) for size in self.num_parameters[1:]], heights[1:]
        if len(places) < 2:
            return None
        points = pairwise(zip(places, heights, strict=True))
        area = sum((right - left) * (low + high) / 2 for (left, low), (right, high) in points)
        return area / (places[-1] - places[0])

    @property
    def best(self) -> tuple[int, float]:
        """The count with the lowest held-out loss (the smallest such), and that loss in nats."""
        index = self.losses.index(min(self.losses))
        return self.counts[index], self.losses[index]

    def smallest_within(self, margin_nats: float) -> Recommendation:
        """The smallest budget that is surely within `margin_nats` of all modules, which always are.

        With a single held-out batch the uncertainty is unknown, so the difference itself decides.
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
            lambda values, weights, axis: np.average(values, axis, weights),
            paired=True,
            vectorized=True,
            confidence_level=CONFIDENCE,
            alternative="less",
            method="percentile",
            rng=np.random.default_rng(0),
        )
        return float(resampled.confidence_interval.high)

    @model_serializer(mode="wrap")
    def _with_findings(self, write: Callable[["MaskCurve"], dict[str, Any]]) -> dict[str, Any]:
        best_count, best_loss = self.best
        found = write(self) | {
            "normalised_area": self.normalised_area,
            "best": {"num_modules": best_count, "loss_nats": best_loss},
        }
        return {name: own for name, own in found.items() if own or name != "num_parameters"}


class Verification(Part):
    """The mask curve of a ranking, and of what it must be better than."""

    schema_: Literal["keylayers/verification"] = Field(
        default="keylayers/verification", alias="schema"
    )
    schema_version: Literal[1] = 1
    ranking_sha256: Text  # of the ranking file's content
    best_first: MaskCurve  # the ranking's own order
    worst_first: MaskCurve  # the reverse order: a ranking can be good at one end only
    random: ListOf[MaskCurve]  # random orders, the control
    leave_one_out: MaskCurve | None = None
    # Of rank-one parts: orders by singular values alone, by name.
    rivals: dict[Text, MaskCurve] = Field(default={})
    # What the recommended budget may lose, as a share of what the fine-tune gained.
    margin: Annotated[float, Field(ge=0, lt=1)] = 0.05
    provenance: dict[Any, Any] = Field(default={})  # keys may hold half a character, unlike `str`
    # The provenance, read as types.
    made_by: MadeBy = Field(default=MadeBy(), validation_alias="provenance", exclude=True)

    @model_validator(mode="after")
    def _has_curves_at_the_same_counts(self) -> "Verification":
        others = (self.leave_one_out or self.best_first, *self.rivals.values())
        curves = (self.worst_first, *self.random, *others)
        own = self.best_first  # orders of parts have their own counts at the same parameters
        is_same = len if own.num_parameters else tuple
        if not self.random or any(is_same(c.counts) != is_same(own.counts) for c in curves):
            raise ValueError("curves at the same counts, with random ones among them")
        return self

    @property
    def recommendation(self) -> Recommendation | None:
        """The smallest budget within the margin of all modules; None if nothing was gained."""
        reduction = self.best_first.reduction_nats
        return self.best_first.smallest_within(self.margin * reduction) if reduction > 0 else None

    def is_of(self, ranking: Ranking) -> bool:
        """Whether it was measured on this ranking as it is."""
        return self.ranking_sha256 == json_sha256(ranking.to_json())

    @property
    def is_overfit(self) -> bool:
        """Whether some subset's loss is lower than that of all by 5 % of what updates change.

        Some updates hurt then, and areas lose their meaning.
        """
        losses = self.best_first.losses
        lowest = min(*losses, *self.random_means())
        return losses[-1] - lowest > 0.05 * abs(self.best_first.reduction_nats)

    def random_means(self) -> list[float]:
        """Mean loss in nats over the random orders, for each count."""
        columns = zip(*(curve.losses for curve in self.random), strict=True)
        return [fmean(column) for column in columns]

    def best_of_rivals(self) -> list[float]:
        """The lowest loss in nats of all orders by singular values, for each count."""
        columns = zip(*(curve.losses for curve in self.rivals.values()), strict=True)
        return [min(column) for column in columns]

    def random_area(self) -> tuple[float, float] | None:
        """Mean and standard deviation of the random orders' normalised areas, if defined."""
        areas = [curve.normalised_area for curve in self.random]
        known = [area for area in areas if area is not None]
        return (fmean(known), stdev(known) if len(known) > 1 else 0.0) if known else None

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        content = self.model_dump(by_alias=True, exclude=set() if self.rivals else {"rivals"})
        found = self.recommendation
        conclusions = {"recommendation": found and vars(found), "is_overfit": self.is_overfit}
        write_json(path, content | conclusions)

    @staticmethod
    def load(path: Path) -> "Verification":
        """Read the file."""
        return read_part(Verification, path, "the verification of the ranking", "keylayers verify")


def auto_budget(ranking: Ranking, path: Path) -> Count:
    """The count that `keylayers verify` recommended for `ranking`, in its verification file."""
    found = Verification.load(path)
    if not found.is_of(ranking):
        raise RankingError(
            f"{str(path)!r} must belong to the ranking, but the ranking changed since; run "
            f"`keylayers verify` again"
        )
    own, other = ranking.made_by, found.made_by
    updates, others = own.update_sha256s, other.update_sha256s
    are_other = {
        "model": are_same(own.model.weights_sha256, other.model.weights_sha256) is False,
        "update": bool(updates and others and updates.isdisjoint(others)),
        "data or split": are_same(own.data.split_sha256, other.data.split_sha256) is False,
    }
    names = [name for name, is_other in are_other.items() if is_other]
    if names:
        raise RankingError(
            f"`budget` auto needs a curve of the ranking's own run, but {str(path)!r} was measured "
            f"with another {' and another '.join(names)}; run `keylayers verify` without options"
        )
    if found.recommendation is None:
        does = "raises it" if found.best_first.reduction_nats < 0 else "changes nothing"
        raise ConfigError(
            f"`budget` auto needs a fine-tune that lowers the held-out loss, but this fine-tune "
            f"{does}; train again, or give a budget"
        )
    return Count(found.recommendation.num_modules)


def verification_file(ranking: str | Path) -> Path:
    """The verification's file: next to ranking.json, or other.verification.json for other.json."""
    path = Path(ranking)
    if path.is_dir():
        return path / FILE
    return path.parent / (FILE if path.name == RANKING else f"{path.stem}.{FILE}")
