# SPDX-License-Identifier: Apache-2.0
"""What `keylayers verify` finds: a ranking's mask curve and its controls. Needs no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from keylayers.errors import ConfigError, RankingError
from keylayers.files import json_sha256, write_json
from keylayers.ranking.budget import Count
from keylayers.ranking.curve import MaskCurve, Recommendation
from keylayers.ranking.ranking import FILE as RANKING
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import MadeBy, read_made_by
from keylayers.validation import ListOf, Part, Text, read_json, validated

SCHEMA = "keylayers/verification"
SCHEMA_VERSION = 1
FILE = "verification.json"
COMMAND = "keylayers verify"


@dataclass(frozen=True)
class Verification:
    """The mask curve of a ranking, and of what it must be better than.

    Attributes:
        ranking_sha256: Hash of the ranking file's content.
        best_first: The ranking's own curve.
        worst_first: The curve of the reverse order: a ranking can be good at one end only.
        random: Curves of random orders, the control, at the same counts.
        leave_one_out: The curve of the leave-one-out order, if it was asked for.
        margin: What the recommended budget may lose, as a share of what the fine-tune gained.
        provenance: Model, data, splits, options, seeds, versions, as JSON.
    """

    ranking_sha256: str
    best_first: MaskCurve
    worst_first: MaskCurve
    random: tuple[MaskCurve, ...]
    leave_one_out: MaskCurve | None = None
    margin: float = 0.05
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def recommendation(self) -> Recommendation | None:
        """The smallest budget within the margin of all modules; None if nothing was gained."""
        reduction = self.best_first.reduction_nats
        return self.best_first.smallest_within(self.margin * reduction) if reduction > 0 else None

    def is_of(self, ranking: Ranking) -> bool:
        """Whether it was measured on this ranking as it is."""
        return self.ranking_sha256 == json_sha256(ranking.to_json())

    @cached_property
    def made_by(self) -> MadeBy:
        """`provenance` as types.

        Raises:
            RankingError: it holds something else; files are checked when they are loaded.
        """
        return read_made_by(self.provenance, "the verification", COMMAND)

    @property
    def is_overfit(self) -> bool:
        """Whether some subset on the curves has a clearly lower loss than all modules.

        Clearly means by 5 % of what all updates change. Some updates hurt then, areas lose their
        meaning, and the best point says more than the end of the curve.
        """
        losses = self.best_first.losses
        lowest = [self.best_first.best[1], min(self.random_means(), default=losses[-1])]
        return losses[-1] - min(lowest) > 0.05 * abs(self.best_first.reduction_nats)

    def random_means(self) -> list[float]:
        """Mean loss in nats over the random orders, for each count."""
        return [
            fmean(losses) for losses in zip(*(curve.losses for curve in self.random), strict=True)
        ]

    def random_area(self) -> tuple[float, float] | None:
        """Mean and standard deviation of the random orders' normalised areas, if defined."""
        areas = [curve.normalised_area for curve in self.random]
        known = [area for area in areas if area is not None]
        return (fmean(known), stdev(known) if len(known) > 1 else 0.0) if known else None

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        recommendation = self.recommendation
        content = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "ranking_sha256": self.ranking_sha256,
            "margin": self.margin,
            "recommendation": None if recommendation is None else vars(recommendation),
            "is_overfit": self.is_overfit,
            "best_first": self.best_first.to_json(),
            "worst_first": self.worst_first.to_json(),
            "random": [curve.to_json() for curve in self.random],
            "leave_one_out": self.leave_one_out and self.leave_one_out.to_json(),
            "provenance": dict(self.provenance),
        }
        write_json(path, content)

    @staticmethod
    def load(path: Path) -> "Verification":
        """Read the file.

        Raises:
            RankingError: it is missing, cut off or of another schema, or its parts do not belong
                together.
        """
        content = read_json(path, "the verification of the ranking", COMMAND)
        file = validated(_File, content, str(path), COMMAND)
        read_made_by(content["provenance"], str(path), COMMAND)
        loo = file.leave_one_out
        curves = (file.worst_first, *file.random, loo or file.best_first)
        if not file.random or any(curve.counts != file.best_first.counts for curve in curves):
            raise RankingError(
                f"{str(path)!r}: all curves, random ones among them, must have the same counts, "
                f"but do not; regenerate it with `{COMMAND}`"
            )
        return Verification(
            ranking_sha256=file.ranking_sha256,
            best_first=MaskCurve(**dict(file.best_first)),
            worst_first=MaskCurve(**dict(file.worst_first)),
            random=tuple(MaskCurve(**dict(curve)) for curve in file.random),
            leave_one_out=None if loo is None else MaskCurve(**dict(loo)),
            margin=file.margin,
            provenance=content["provenance"],
        )


class _Curve(Part):
    counts: ListOf[int]
    losses: ListOf[float]
    batch_losses: ListOf[ListOf[float]]
    batch_weights: ListOf[float]

    @model_validator(mode="after")
    def _has_a_loss_for_each_count(self) -> "_Curve":
        if self.counts[:1] != (0,) or any(low >= high for low, high in pairwise(self.counts)):
            raise ValueError(f"a curve whose counts rise from 0, not {self.counts[:9]}")
        num_rows = len(self.counts) if self.batch_weights else 0
        sizes = {len(row) for row in self.batch_losses}
        if len(self.counts) < 2 or len(self.losses) != len(self.counts):
            raise ValueError(f"a curve with a loss for each of its {len(self.counts)} counts")
        if len(self.batch_losses) != num_rows or sizes - {len(self.batch_weights)}:
            raise ValueError(f"a curve with a loss for each of {len(self.batch_weights)} batches")
        return self


class _File(Part):
    schema_: Annotated[Literal["keylayers/verification"], Field(alias="schema")]
    schema_version: Literal[1]
    ranking_sha256: Text
    margin: Annotated[float, Field(ge=0, lt=1)]
    best_first: _Curve
    worst_first: _Curve
    random: ListOf[_Curve]
    leave_one_out: _Curve | None
    provenance: dict[Any, Any]


def auto_budget(ranking: Ranking, path: Path) -> Count:
    """The count that `keylayers verify` recommended for `ranking`.

    Args:
        ranking: As loaded from its file.
        path: Its verification file.

    Raises:
        RankingError: not verified yet, verified before the ranking changed, or with another model,
            update or data than the ranking's own.
        ConfigError: the fine-tune gained nothing, so no budget is recommended.
    """
    found = Verification.load(path)
    if not found.is_of(ranking):
        raise RankingError(
            f"{str(path)!r} must belong to the ranking, but the ranking changed since; run "
            f"`keylayers verify` again"
        )
    _check_same_inputs(ranking, found, path)
    if found.recommendation is None:
        does = "raises it" if found.best_first.reduction_nats < 0 else "changes nothing"
        raise ConfigError(
            f"`budget` auto needs a fine-tune that lowers the held-out loss, but this fine-tune "
            f"{does}; train again, or give a budget"
        )
    return Count(found.recommendation.num_modules)


def _check_same_inputs(ranking: Ranking, found: Verification, path: Path) -> None:
    """Refuse a curve that was not measured on the ranking's own model, update and data."""
    own, other = ranking.made_by, found.made_by
    updates, others = own.update_sha256s, other.update_sha256s
    are_other = {
        "model": _are_other(own.model.weights_sha256, other.model.weights_sha256),
        "update": bool(updates and others and updates.isdisjoint(others)),
        "data or split": _are_other(own.data.split_sha256, other.data.split_sha256),
    }
    names = [name for name, is_other in are_other.items() if is_other]
    if names:
        raise RankingError(
            f"`budget` auto needs a curve of the ranking's own run, but {str(path)!r} was measured "
            f"with another {' and another '.join(names)}; run `keylayers verify` without options"
        )


def _are_other(own: str | None, other: str | None) -> bool:
    """Whether both hashes are known and differ."""
    return None not in (own, other) and own != other


def verification_file(ranking: str | Path) -> Path:
    """Where the verification of a ranking file or its folder is written.

    verification.json for ranking.json, other.verification.json for other.json.
    """
    path = Path(ranking)
    if path.is_dir():
        return path / FILE
    return path.parent / (FILE if path.name == RANKING else f"{path.stem}.{FILE}")
