# SPDX-License-Identifier: Apache-2.0
"""Measures from documents, and evaluation.json: values, intervals, chance, differences of models.

Needs no torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from keylayers.evaluation import statistics
from keylayers.evaluation.documents import Measured
from keylayers.files import write_json

EVALUATION = "evaluation.json"
FORMAT = "keylayers evaluation 1"
ALPHA = 0.05
DOCUMENT = ["task", "document", "document_sha256"]

AllMeasured = Mapping[str, Mapping[str, Measured]]  # model -> task -> what was measured


@dataclass
class Difference:
    """One model minus another on the same documents."""

    against: str  # name of the other model
    value: float
    interval: statistics.Interval | None = None  # None where the documents do not allow it
    p: float | None = None  # of "no difference", by flipping signs; None without an interval
    p_holm: float | None = None  # corrected for all differences in the table, by `correct`

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
    interval: statistics.Interval | None
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


@dataclass(frozen=True)
class Part:
    """Tasks whose documents make one measure: a single task, or the tasks of a group."""

    name: str
    tasks: tuple[str, ...]
    metric: str | None = None  # that a group averages; None for all metrics of a task
    filters: Sequence[str] | None = None  # of the harness; None: all
    is_by_size: bool = True  # whether every document has the same weight, or every task
    depth: int = 0  # in nested groups
    is_in_table: bool = True

    def takes(self, name: str) -> bool:
        """Whether the part includes the metric with this name (see `metric_name`)."""
        metric, _, filter = name.removesuffix(")").partition(" (")
        is_filter = self.filters is None or (filter or "none") in self.filters
        return self.metric is None or (metric == self.metric and is_filter)


def metric_name(metric: str, filter: str) -> str:
    """The name of a metric of the harness here: with its filter, if it has one."""
    return metric if filter == "none" else f"{metric} ({filter})"


def measures_of(
    part: Part, measured: AllMeasured, reference: str | None, seed: int
) -> Iterator[Measure]:
    """The measures of one part, for all models, compared with the first and with `reference`.

    Skips metrics that a model lacks, and metrics of a group that are no means over documents.
    """
    base = next(iter(measured.values()))
    names = dict.fromkeys(name for task in part.tasks for name in base[task].totals)
    for metric in filter(part.takes, names):
        tasks = [task for task in part.tasks if metric in base[task].totals]
        documents, chance = _documents(metric, tasks, measured, part.is_by_size)
        if documents is not None:
            values = {model: own.mean() for model, own in documents.items()}
        else:
            totals = {model: found[tasks[0]].totals for model, found in measured.items()}
            values = {model: own[metric] for model, own in totals.items() if metric in own}
            if part.metric is not None or len(values) < len(totals):
                continue
        yield Measure(
            task=part.name,
            metric=metric,
            num_documents=0 if documents is None else len(next(iter(documents.values())).values),
            chance=chance,
            higher_is_better=base[tasks[0]].higher_is_better.get(metric),
            results=tuple(_results(values, documents, reference, seed)),
            members=() if part.metric is None else tuple(tasks),
            depth=part.depth,
            is_in_table=part.is_in_table,
        )


def _documents(
    metric: str, tasks: Sequence[str], measured: AllMeasured, is_by_size: bool
) -> tuple[dict[str, statistics.Documents] | None, float | None]:
    """The documents of each model in one order, and the chance level if it is known.

    Without documents if the metric is no mean (such as a perplexity), or if a task left out
    documents of some models.
    """
    rows = {
        model: pd.concat(
            [found[task].rows[found[task].rows["metric"] == metric] for task in tasks]
        ).set_index(DOCUMENT)
        for model, found in measured.items()
    }
    base = next(iter(rows.values()))
    of_task = base.index.get_level_values("task")
    if set(of_task) != set(tasks) or any(
        set(own.index) != set(base.index) for own in rows.values()
    ):
        return None, None
    strata = np.array([tasks.index(task) for task in of_task])
    counts = np.bincount(strata)
    weights = counts / counts.sum() if is_by_size else np.full(len(tasks), 1 / len(tasks))

    def documents(own: pd.DataFrame, values: str) -> statistics.Documents:
        own = own.reindex(base.index)
        return statistics.Documents(
            own[values].to_numpy(float), own["size"].to_numpy(float), strata, weights
        )

    chance = documents(base, "chance").mean()
    found = {model: documents(own, "value") for model, own in rows.items()}
    return found, None if np.isnan(chance) else chance


def _results(
    values: Mapping[str, float],
    documents: Mapping[str, statistics.Documents] | None,
    reference: str | None,
    seed: int,
) -> Iterator[Result]:
    """The results of all models; without documents, numbers that have no intervals."""
    base = next(iter(values))
    for model, value in values.items():
        differences = []
        for other in filter(None, (base, reference)):
            if model in (base, other):
                continue
            difference = Difference(other, value - values[other])
            if documents is not None:
                less = documents[model].less(documents[other])
                difference.value = less.mean()
                difference.interval = statistics.difference_interval(less, seed)
                if difference.interval is not None:
                    difference.p = statistics.sign_flip_p(less, seed)
            differences.append(difference)
        own = None if documents is None else statistics.interval(documents[model], seed)
        yield Result(model, value, own, tuple(differences))


def correct(measures: Sequence[Measure]) -> None:
    """Give the differences in the table their p-values by Holm's correction over all of them."""
    results = [result for measure in measures if measure.is_in_table for result in measure.results]
    every = [found for result in results for found in result.differences]
    tested = [found for found in every if found.p is not None]
    p_values = statistics.holm([found.p for found in tested if found.p is not None])
    for found, p_holm in zip(tested, p_values, strict=True):
        found.p_holm = p_holm
