# SPDX-License-Identifier: Apache-2.0
"""What an evaluation shows: each measure of each model, with intervals, chance and differences.

Needs no torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from keylayers.evaluation.documents import Measured
from keylayers.evaluation.statistics import (
    Documents,
    Interval,
    difference_interval,
    holm,
    interval,
    sign_flip_p,
)

ALPHA = 0.05
WHERE = ["task", "document", "document_sha256"]


@dataclass(frozen=True)
class Difference:
    """One model less another on the same documents.

    Attributes:
        against: Name of the other.
        value: Of the difference.
        interval: 95 %, by bootstrap over documents; None where the documents do not allow one.
        p: Of "no difference", by flipping signs; None without an interval.
        p_holm: Corrected for all differences that the evaluation shows.
    """

    against: str
    value: float
    interval: Interval | None = None
    p: float | None = None
    p_holm: float | None = None

    @property
    def is_shown(self) -> bool:
        """Whether there is more to it than the choice of the documents."""
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
    """One measure, of all models.

    Attributes:
        task: Task, group or set.
        metric: Of it.
        num_documents: What it is a mean over.
        chance: What guessing gives, if that is known.
        higher_is_better: Whether more is better, if that is known.
        results: In the order of the models.
        members: Of a group, the tasks that it averages.
        depth: How deep it stands in groups of groups.
        is_in_table: Whether the terminal shows it; the record holds all.
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

    def to_json(self) -> dict[str, Any]:
        """As a record holds it."""
        return asdict(self)

    @staticmethod
    def from_json(content: Mapping[str, Any]) -> "Measure":
        """From what `to_json` gave."""
        results = [
            Result(
                one["model"],
                one["value"],
                _interval(one["interval"]),
                tuple(
                    Difference(**(each | {"interval": _interval(each["interval"])}))
                    for each in one["differences"]
                ),
            )
            for one in content["results"]
        ]
        members = tuple(content["members"])
        return Measure(**{**content, "results": tuple(results), "members": members})


def _interval(content: Mapping[str, Any] | None) -> Interval | None:
    return None if content is None else Interval(**content)


@dataclass(frozen=True)
class Part:
    """Tasks whose documents make one measure; a single task, or those of a group.

    Attributes:
        name: Of the task or group.
        tasks: Which documents.
        is_by_size: Whether every document weighs the same, or every task.
        metric: Which metric; None for all.
        filters: With which of the harness' filters; None for all.
        depth: How deep it stands in groups of groups.
        is_group: Whether it averages tasks.
        in_table: Which of its metrics the terminal shows; None for all.
    """

    name: str
    tasks: tuple[str, ...]
    is_by_size: bool = True
    metric: str | None = None
    filters: tuple[str, ...] | None = None
    depth: int = 0
    is_group: bool = False
    in_table: tuple[str, ...] | None = None

    def takes(self, name: str) -> bool:
        """Whether a metric, by the name that it has here, is among those of the part."""
        if self.metric is None:
            return True
        if self.filters is None:
            return name == self.metric or name.startswith(f"{self.metric} (")
        return name in [metric_name(self.metric, one) for one in self.filters]


def metric_name(metric: str, filter: str) -> str:
    """What a metric of the harness is called here: by its filter too, where it has one."""
    return metric if filter == "none" else f"{metric} ({filter})"


def measures_of(
    part: Part,
    measured: Mapping[str, Mapping[str, Measured]],
    reference: str | None,
    seed: int,
) -> Iterator[Measure]:
    """The measures of one part, for all models.

    Args:
        part: Which tasks.
        measured: Name of the model -> name of the task -> what was measured. The first model is
            the one that all others are compared with.
        reference: A second one to compare with.
        seed: Of the bootstrap.
    """
    models = list(measured)
    tables = {
        model: {task: measured[model][task] for task in part.tasks if task in measured[model]}
        for model in models
    }
    names = dict.fromkeys(name for one in tables[models[0]].values() for name in one.totals)
    for metric in filter(part.takes, names):
        holders = [task for task, one in tables[models[0]].items() if metric in one.totals]
        if holders and (found := _measure(part, metric, holders, tables, reference, seed)):
            yield found


def _measure(
    part: Part,
    metric: str,
    tasks: Sequence[str],
    tables: Mapping[str, Mapping[str, Measured]],
    reference: str | None,
    seed: int,
) -> Measure | None:
    """None where a model has no number, or a group would average what is no mean over documents."""
    base, *_ = models = list(tables)
    rows = {
        model: pd.concat(
            [one.rows[one.rows["metric"] == metric] for one in (tables[model][t] for t in tasks)]
        )
        for model in models
    }
    first = tables[base][tasks[0]]
    found = Measure(
        task=part.name,
        metric=metric,
        num_documents=len(rows[base]),
        chance=None,
        higher_is_better=first.higher_is_better.get(metric),
        results=(),
        members=tuple(tasks) if part.is_group else (),
        depth=part.depth,
        is_in_table=part.in_table is None or metric in part.in_table,
    )
    is_mean = set(rows[base]["task"]) == set(tasks)  # of every task
    if not is_mean or not _are_of_the_same_documents(rows):
        totals = {model: tables[model][tasks[0]].totals.get(metric) for model in models}
        known = {model: value for model, value in totals.items() if value is not None}
        if part.is_group or len(known) < len(models):
            return None
        return replace(found, num_documents=0, results=_without_intervals(known, reference))
    documents = {
        model: _documents(rows[model], rows[base], tasks, part.is_by_size) for model in models
    }
    results = []
    for model, own in documents.items():
        differences = []
        for other in _others(model, base, reference):
            less = own.less(documents[other])
            around = difference_interval(less, seed)
            p = None if around is None else sign_flip_p(less, seed)
            differences.append(Difference(other, less.mean(), around, p))
        results.append(Result(model, own.mean(), interval(own, seed), tuple(differences)))
    chances = replace(documents[base], values=rows[base]["chance"].to_numpy(float))
    is_known = not np.isnan(chances.values).any()
    return replace(found, chance=chances.mean() if is_known else None, results=tuple(results))


def _without_intervals(totals: Mapping[str, float], reference: str | None) -> tuple[Result, ...]:
    """Of what is no mean over documents, such as a perplexity: the numbers alone."""
    base = next(iter(totals))
    return tuple(
        Result(
            model,
            value,
            None,
            tuple(
                Difference(other, value - totals[other])
                for other in _others(model, base, reference)
            ),
        )
        for model, value in totals.items()
    )


def _others(model: str, base: str, reference: str | None) -> list[str]:
    """What a model is compared with."""
    if model == base:
        return []
    return [base] if reference in (None, model) else [base, str(reference)]


def _are_of_the_same_documents(rows: Mapping[str, pd.DataFrame]) -> bool:
    """Whether every model has a value for the same documents; a task may leave some out."""
    first, *others = (set(map(tuple, one[WHERE].to_numpy())) for one in rows.values())
    return all(one == first for one in others)


def _documents(
    rows: pd.DataFrame, base: pd.DataFrame, tasks: Sequence[str], is_by_size: bool
) -> Documents:
    """The rows of a model, in the order of the base model's."""
    rows = base[WHERE].merge(rows, on=WHERE, how="left", validate="one_to_one")
    strata = rows["task"].map({task: number for number, task in enumerate(tasks)}).to_numpy(int)
    counts = np.bincount(strata, minlength=len(tasks))
    weights = counts / counts.sum() if is_by_size else np.full(len(tasks), 1 / len(tasks))
    values, sizes = rows["value"].to_numpy(float), rows["size"].to_numpy(float)
    return Documents(values, sizes, strata, weights)


def corrected(measures: Sequence[Measure]) -> list[Measure]:
    """The measures, with the p-values of all differences in the table corrected together."""
    p_values = [
        one.p
        for measure in measures
        if measure.is_in_table
        for result in measure.results
        for one in result.differences
        if one.p is not None
    ]
    remaining = iter(holm(p_values))

    def give(one: Difference) -> Difference:
        return one if one.p is None else replace(one, p_holm=next(remaining))

    return [
        measure
        if not measure.is_in_table
        else replace(
            measure,
            results=tuple(
                replace(result, differences=tuple(give(one) for one in result.differences))
                for result in measure.results
            ),
        )
        for measure in measures
    ]
