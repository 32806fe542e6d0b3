# SPDX-License-Identifier: Apache-2.0
"""evaluation.json: measures of all models, with intervals and differences. Needs no torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from keylayers.errors import RankingError
from keylayers.evaluation.statistics import Interval
from keylayers.files import write_json

EVALUATION = "evaluation.json"
FORMAT = "keylayers evaluation 1"
ALPHA = 0.05


@dataclass(frozen=True)
class Difference:
    """One model minus another on the same documents.

    Attributes:
        against: Name of the other model.
        value: The difference.
        interval: 95 %, by bootstrap over documents; None where the documents do not allow it.
        p: p-value of "no difference", by flipping signs; None without an interval.
        p_holm: Corrected for all differences in the table.
    """

    against: str
    value: float
    interval: Interval | None = None
    p: float | None = None
    p_holm: float | None = None

    @property
    def is_shown(self) -> bool:
        """Whether the difference is more than the choice of documents explains."""
        if self.interval is None or self.p is None:
            return False
        return not self.interval.holds(0.0) and self.p < ALPHA


@dataclass(frozen=True)
class Result:
    """One measure of one model, with its differences to others."""

    model: str
    value: float
    interval: Interval | None
    differences: tuple[Difference, ...] = ()


@dataclass(frozen=True)
class Measure:
    """One measure of all models.

    Attributes:
        task: Task, group or data set.
        metric: Its metric.
        num_documents: How many documents it is a mean over; 0 if it is not a mean.
        chance: What guessing gives, if known.
        higher_is_better: Whether more is better, if known.
        results: In the order of the models.
        members: The tasks that a group averages.
        depth: Depth in nested groups.
        is_in_table: Whether the terminal shows it; the record holds all measures.
    """

    task: str
    metric: str
    num_documents: int
    chance: float | None
    higher_is_better: bool | None
    results: tuple[Result, ...]
    members: tuple[str, ...] = ()
    depth: int = 0
    is_in_table: bool = True


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as it is recorded.

    Attributes:
        measures: All measures of all models.
        models: What each model is, by its name in the table; the base model first.
        reference: The model that the others are compared with in addition to the base model.
        notes: What a reader must know, such as cut prompts.
        provenance: Options, environment, data, tasks.
    """

    measures: tuple[Measure, ...]
    models: Mapping[str, Mapping[str, Any]]
    reference: str | None
    notes: tuple[str, ...]
    provenance: Mapping[str, Any]

    def save(self, path: str | Path) -> None:
        """Write the file whole or not at all."""
        write_json(Path(path), {"format": FORMAT, **asdict(self)})

    @staticmethod
    def load(path: str | Path) -> "Evaluation":
        """Read a file, or evaluation.json in a folder.

        Raises:
            RankingError: it is missing, damaged or something else.
        """
        path = Path(path)
        path = path / EVALUATION if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}, not {FORMAT!r}")
            return TypeAdapter(Evaluation).validate_python(content)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RankingError(
                f"{str(path)!r} must be an evaluation by `keylayers eval`, but cannot be read: "
                f"{' '.join(str(error).split())[:300]}"
            ) from error
