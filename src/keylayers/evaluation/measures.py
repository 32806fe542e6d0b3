# SPDX-License-Identifier: Apache-2.0
"""Measures from documents: values, intervals, chance, and differences between models.

Needs no torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from keylayers.evaluation.documents import Measured
from keylayers.evaluation.record import Difference, Measure, Result
from keylayers.evaluation.statistics import (
    Documents,
    difference_interval,
    holm,
    interval,
    sign_flip_p,
)

DOCUMENT = ["task", "document", "document_sha256"]

AllMeasured = Mapping[str, Mapping[str, Measured]]  # model -> task -> what was measured


@dataclass(frozen=True)
class Part:
    """Tasks whose documents make one measure: a single task, or the tasks of a group.

    Attributes:
        name: Name of the task or group.
        tasks: Which tasks.
        is_by_size: Whether every document has the same weight, or every task.
        metric: Which metric; None for all.
        filters: With which filters of the harness; None for all.
        depth: Depth in nested groups.
        is_group: Whether it averages tasks.
        is_in_table: Whether the terminal shows it.
    """

    name: str
    tasks: tuple[str, ...]
    is_by_size: bool = True
    metric: str | None = None
    filters: tuple[str, ...] | None = None
    depth: int = 0
    is_group: bool = False
    is_in_table: bool = True

    def takes(self, name: str) -> bool:
        """Whether the part includes the metric with this name (see `metric_name`)."""
        if self.metric is None:
            return True
        if self.filters is None:
            return name == self.metric or name.startswith(f"{self.metric} (")
        return name in [metric_name(self.metric, filter) for filter in self.filters]


def metric_name(metric: str, filter: str) -> str:
    """The name of a metric of the harness here: with its filter, if it has one."""
    return metric if filter == "none" else f"{metric} ({filter})"


def measures_of(
    part: Part, measured: AllMeasured, reference: str | None, seed: int
) -> Iterator[Measure]:
    """The measures of one part, for all models.

    Args:
        part: Which tasks.
        measured: All others are compared with the first model.
        reference: A second model to compare with.
        seed: Seed of the bootstrap.
    """
    base = measured[next(iter(measured))]
    names = dict.fromkeys(name for task in part.tasks for name in base[task].totals)
    for metric in filter(part.takes, names):
        tasks = [task for task in part.tasks if metric in base[task].totals]
        if found := _measure(part, metric, tasks, measured, reference, seed):
            yield found


def _measure(
    part: Part,
    metric: str,
    tasks: Sequence[str],
    measured: AllMeasured,
    reference: str | None,
    seed: int,
) -> Measure | None:
    """None if a model has no number, or if a group would average what is no mean."""
    rows = {
        model: pd.concat([found[task].rows[found[task].rows["metric"] == metric] for task in tasks])
        for model, found in measured.items()
    }
    base = next(iter(measured))
    measure = Measure(
        task=part.name,
        metric=metric,
        num_documents=len(rows[base]),
        chance=None,
        higher_is_better=measured[base][tasks[0]].higher_is_better.get(metric),
        results=(),
        members=tuple(tasks) if part.is_group else (),
        depth=part.depth,
        is_in_table=part.is_in_table,
    )
    is_mean = set(rows[base]["task"]) == set(tasks)  # else e.g. a perplexity, without rows
    same = {frozenset(map(tuple, own[DOCUMENT].to_numpy())) for own in rows.values()}
    if not is_mean or len(same) > 1:  # a task may leave out documents of some models
        totals = {model: found[tasks[0]].totals.get(metric) for model, found in measured.items()}
        values = {model: value for model, value in totals.items() if value is not None}
        if part.is_group or len(values) < len(totals):
            return None
        results = _results(values, None, reference, seed)
        return replace(measure, num_documents=0, results=results)
    documents = {
        model: _documents(own, rows[base], tasks, part.is_by_size) for model, own in rows.items()
    }
    means = {model: own.mean() for model, own in documents.items()}
    chances = replace(documents[base], values=rows[base]["chance"].to_numpy(float))
    return replace(
        measure,
        chance=None if np.isnan(chances.values).any() else chances.mean(),
        results=_results(means, documents, reference, seed),
    )


def _results(
    values: Mapping[str, float],
    documents: Mapping[str, Documents] | None,
    reference: str | None,
    seed: int,
) -> tuple[Result, ...]:
    """The results of all models; without documents, numbers that have no intervals."""
    base, *_ = values
    results = []
    for model, value in values.items():
        own = None if documents is None else interval(documents[model], seed)
        others = [] if model == base else [base]
        others += [reference] if others and reference not in (None, model) else []
        differences = []
        for other in others:
            found = Difference(other, value - values[other])
            if documents is not None:
                less = documents[model].less(documents[other])
                around = difference_interval(less, seed)
                p = None if around is None else sign_flip_p(less, seed)
                found = Difference(other, less.mean(), around, p)
            differences.append(found)
        results.append(Result(model, value, own, tuple(differences)))
    return tuple(results)


def _documents(
    rows: pd.DataFrame, base: pd.DataFrame, tasks: Sequence[str], is_by_size: bool
) -> Documents:
    """The rows of a model, in the order of the base model's rows."""
    rows = base[DOCUMENT].merge(rows, on=DOCUMENT, how="left", validate="one_to_one")
    strata = rows["task"].map({task: number for number, task in enumerate(tasks)}).to_numpy(int)
    counts = np.bincount(strata, minlength=len(tasks))
    weights = counts / counts.sum() if is_by_size else np.full(len(tasks), 1 / len(tasks))
    return Documents(rows["value"].to_numpy(float), rows["size"].to_numpy(float), strata, weights)


def corrected(measures: Sequence[Measure]) -> list[Measure]:
    """The measures, with Holm's correction over all differences in the table."""
    results = [result for measure in measures if measure.is_in_table for result in measure.results]
    tested = [found.p for result in results for found in result.differences if found.p is not None]
    p_holm = iter(holm(tested))

    def with_p(result: Result) -> Result:
        differences = (
            found if found.p is None else replace(found, p_holm=next(p_holm))
            for found in result.differences
        )
        return replace(result, differences=tuple(differences))

    return [
        replace(measure, results=tuple(map(with_p, measure.results)))
        if measure.is_in_table
        else measure
        for measure in measures
    ]
