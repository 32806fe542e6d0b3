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
    """Tasks whose documents make one measure: a single task, or the tasks of a group."""

    name: str
    tasks: tuple[str, ...]
    metric: str | None = None  # None: all
    filters: Sequence[str] | None = None  # of the harness; None: all
    is_by_size: bool = True  # whether every document has the same weight, or every task
    is_group: bool = False
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
    """The measures of one part, for all models.

    They are compared with the first model, and with `reference`. Left out is what a model has no
    number for, and what is no mean but should be averaged.
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
            if part.is_group or len(values) < len(totals):
                continue
        yield Measure(
            task=part.name,
            metric=metric,
            num_documents=0 if documents is None else len(next(iter(documents.values())).values),
            chance=chance,
            higher_is_better=base[tasks[0]].higher_is_better.get(metric),
            results=tuple(_results(values, documents, reference, seed)),
            members=tuple(tasks) if part.is_group else (),
            depth=part.depth,
            is_in_table=part.is_in_table,
        )


def _documents(
    metric: str, tasks: Sequence[str], measured: AllMeasured, is_by_size: bool
) -> tuple[dict[str, Documents] | None, float | None]:
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

    def documents(own: pd.DataFrame, values: str) -> Documents:
        own = own.reindex(base.index)
        return Documents(own[values].to_numpy(float), own["size"].to_numpy(float), strata, weights)

    chance = documents(base, "chance").mean()
    found = {model: documents(own, "value") for model, own in rows.items()}
    return found, None if np.isnan(chance) else chance


def _results(
    values: Mapping[str, float],
    documents: Mapping[str, Documents] | None,
    reference: str | None,
    seed: int,
) -> Iterator[Result]:
    """The results of all models; without documents, numbers that have no intervals."""
    base = next(iter(values))
    for model, value in values.items():
        differences = []
        for other in filter(None, (base, reference)):
            if base == model or other == model:
                continue
            difference = Difference(other, value - values[other])
            if documents is not None:
                less = documents[model].less(documents[other])
                around = difference_interval(less, seed)
                p = None if around is None else sign_flip_p(less, seed)
                difference = Difference(other, less.mean(), around, p)
            differences.append(difference)
        own = None if documents is None else interval(documents[model], seed)
        yield Result(model, value, own, tuple(differences))


def corrected(measures: Sequence[Measure]) -> list[Measure]:
    """The measures, with Holm's correction over all differences in the table."""
    results = [result for measure in measures if measure.is_in_table for result in measure.results]
    tested = [found.p for result in results for found in result.differences if found.p is not None]
    p_holm = iter(holm(tested))

    def with_p(result: Result) -> Result:
        differences = [
            found if found.p is None else replace(found, p_holm=next(p_holm))
            for found in result.differences
        ]
        return replace(result, differences=tuple(differences))

    return [
        replace(measure, results=tuple(map(with_p, measure.results)))
        if measure.is_in_table
        else measure
        for measure in measures
    ]
