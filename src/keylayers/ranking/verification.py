# SPDX-License-Identifier: Apache-2.0
"""What `keylayers verify` found about a ranking: its mask curve beside controls. Needs no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from keylayers.errors import ConfigError, RankingError
from keylayers.files import json_sha256, write_json
from keylayers.ranking.budget import Count
from keylayers.ranking.curve import MaskCurve, Recommendation
from keylayers.ranking.ranking import FILE as RANKING
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import check_provenance, update_sha256s

SCHEMA = "keylayers/verification"
SCHEMA_VERSION = 1
FILE = "verification.json"


@dataclass(frozen=True)
class Verification:
    """The mask curve of a ranking, and of what it must be better than.

    Attributes:
        ranking_sha256: Of the ranking file's content.
        best_first: The ranking's own curve.
        worst_first: That of the reverse order: a ranking can be good at one end only.
        random: Those of random orders, the control; at the same counts.
        leave_one_out: That of the leave-one-out order, if it was asked for.
        margin: What the recommended budget may lose, as a share of what the fine-tune gained.
        provenance: Model, data, splits, options, seeds, versions. JSON-able.
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
        """The smallest budget within the margin of all modules; None if nothing was gained.

        With nothing gained there is nothing to keep a share of; see `best_first.best` then.
        """
        reduction = self.best_first.reduction_nats
        return self.best_first.smallest_within(self.margin * reduction) if reduction > 0 else None

    def is_of(self, ranking: Ranking) -> bool:
        """Whether it was measured on this ranking as it is."""
        return self.ranking_sha256 == json_sha256(ranking.to_json())

    @property
    def is_overfit(self) -> bool:
        """Whether some subset on the curves, best first or random, has a lower loss than all.

        By at least 5 % of what all updates change: then some updates hurt, areas lose their
        meaning, and the best point says more than the end of the curve.
        """
        losses = self.best_first.losses
        lowest = [self.best_first.best[1], min(self.random_means(), default=losses[-1])]
        return losses[-1] - min(lowest) > 0.05 * abs(self.best_first.reduction_nats)

    def random_means(self) -> list[float]:
        """Mean loss in nats over the random orders, for each count."""
        return [fmean(losses) for losses in zip(*(one.losses for one in self.random), strict=True)]

    def random_area(self) -> tuple[float, float] | None:
        """Mean and standard deviation of the random orders' normalised areas, if defined."""
        areas = [one.normalised_area for one in self.random]
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

    def _checked(self, source: str) -> "Verification":
        """Itself, if its parts belong together.

        Raises:
            ValueError, RankingError: they do not.
        """
        curves = (self.worst_first, *self.random, self.leave_one_out or self.best_first)
        if not self.random or any(one.counts != self.best_first.counts for one in curves):
            raise ValueError("all curves, random ones among them, must have the same counts")
        if not 0 <= self.margin < 1:
            raise ValueError(f"the margin must be a share from 0 to below 1, got {self.margin}")
        check_provenance(self.provenance, source)
        return self

    @staticmethod
    def load(path: Path) -> "Verification":
        """Read the file.

        Raises:
            RankingError: it is missing, cut off or of another schema.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA or content["schema_version"] != SCHEMA_VERSION:
                raise ValueError(f"it has schema {content['schema']!r}")
            loo = content["leave_one_out"]
            return Verification(
                ranking_sha256=content["ranking_sha256"],
                best_first=MaskCurve.from_json(content["best_first"]),
                worst_first=MaskCurve.from_json(content["worst_first"]),
                random=tuple(MaskCurve.from_json(one) for one in content["random"]),
                leave_one_out=None if loo is None else MaskCurve.from_json(loo),
                margin=float(content["margin"]),
                provenance=content["provenance"],
            )._checked(str(path))
        except FileNotFoundError:
            raise RankingError(
                f"the ranking must have been verified, but there is no {str(path)!r}; make it with "
                f"`keylayers verify`"
            ) from None
        except OSError as error:
            raise RankingError(f"{str(path)!r} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise RankingError(
                f"{str(path)!r} must be a whole verification file, but is damaged or of another "
                f"kind ({error}); make it again with `keylayers verify`"
            ) from None


def auto_budget(ranking: Ranking, path: Path) -> Count:
    """The count that `keylayers verify` recommended for `ranking`.

    Args:
        ranking: As loaded from its file.
        path: The verification file beside it.

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
            f"`budget` auto needs a fine-tune that lowers the held-out loss, but this one {does}; "
            f"train it anew, or give a budget"
        )
    return Count(found.recommendation.num_modules)


def _check_same_inputs(ranking: Ranking, found: Verification, path: Path) -> None:
    """Refuse a curve that was not measured on the ranking's own model, update and data."""
    own, other = ranking.provenance, found.provenance
    updates = update_sha256s(own), update_sha256s(other)
    differ = {
        "model": _differ(own, other, "model", "weights_sha256"),
        "update": bool(updates[0] and updates[1] and updates[0].isdisjoint(updates[1])),
        "data or split": _differ(own, other, "data", "split_sha256"),
    }
    names = [name for name, is_other in differ.items() if is_other]
    if names:
        raise RankingError(
            f"`budget` auto needs a curve of the ranking's own run, but {str(path)!r} was measured "
            f"with another {' and another '.join(names)}; run `keylayers verify` without options"
        )


def _differ(own: Mapping[str, Any], other: Mapping[str, Any], part: str, name: str) -> bool:
    """Whether both records know it, and it is not the same."""
    values = own.get(part, {}).get(name), other.get(part, {}).get(name)
    return None not in values and values[0] != values[1]


def verification_file(ranking: str | Path) -> Path:
    """Where the verification of a ranking file, or of the folder that holds it, is written.

    Beside ranking.json it is verification.json, beside other.json other.verification.json.
    """
    path = Path(ranking)
    if path.is_dir():
        return path / FILE
    return path.parent / (FILE if path.name == RANKING else f"{path.stem}.{FILE}")
