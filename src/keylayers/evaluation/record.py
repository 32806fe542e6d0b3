# SPDX-License-Identifier: Apache-2.0
"""evaluation.json: measures of all models, with intervals and differences. Needs no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from keylayers.evaluation.statistics import Interval
from keylayers.files import write_json

EVALUATION = "evaluation.json"
FORMAT = "keylayers evaluation 1"
ALPHA = 0.05


@dataclass(frozen=True)
class Difference:
    """One model minus another on the same documents."""

    against: str  # name of the other model
    value: float
    interval: Interval | None = None  # None where the documents do not allow it
    p: float | None = None  # of "no difference", by flipping signs; None without an interval
    p_holm: float | None = None  # corrected for all differences in the table

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
    """One measure of all models."""

    task: str  # or group, or data set
    metric: str
    num_documents: int  # that it is a mean over; 0 if it is not a mean
    chance: float | None  # what guessing gives, if known
    higher_is_better: bool | None  # None: unknown
    results: tuple[Result, ...]  # in the order of the models
    members: tuple[str, ...] = ()  # the tasks that a group averages
    depth: int = 0  # in nested groups
    is_in_table: bool = True  # of the terminal


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as it is recorded."""

    measures: tuple[Measure, ...]
    models: Mapping[str, Mapping[str, Any]]  # by name in the table; the base model first
    reference: str | None  # what the others are compared with in addition to the base model
    notes: tuple[str, ...]  # what a reader must know, such as cut prompts
    provenance: Mapping[str, Any]  # options, environment, data, tasks

    def save(self, path: Path) -> None:
        """Write the file whole or not at all."""
        write_json(path, {"format": FORMAT, **asdict(self)})
