# SPDX-License-Identifier: Apache-2.0
"""What a study found, seeds taken together: means with their 95 % intervals. Needs no torch."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from keylayers.commands.study.agreement import agreement_means
from keylayers.commands.study.table import OF_BASE

AGREEMENT_TITLE = "Agreement of rankings"
AGREEMENT = ("best", "Jaccard", "lowest to highest", "chance", "tau-b", "pairs")
REPLICATE = "seed"  # the axis whose entries are runs of the same thing
MEANS = ("mean", "low", "high", "runs", "beside")  # columns of a summary after its axes


@dataclass(frozen=True)
class Shown:
    """A measure that summaries show.

    Attributes:
        measure: Its name in the table.
        title: What a reader sees.
        beside: The measure that stands beside it.
        reference: What that is called.
    """

    measure: str
    title: str
    beside: str
    reference: str


ALWAYS = (
    Shown("area", "Area under the mask curve", "area_of_random_orders", "random orders"),
    Shown("held_out_loss", "Held-out loss after training", "held_out_loss_base", "base model"),
)


def shown_in(table: pd.DataFrame) -> list[Shown]:
    """What summaries show of a table: mask curves, trainings, and what evaluations measured."""
    names = [*dict.fromkeys(table["measure"].dropna())]
    evaluated = [
        Shown(name, name, f"{name}{OF_BASE}", "base model")
        for name in names
        if f"{name}{OF_BASE}" in names
    ]
    return [one for one in (*ALWAYS, *evaluated) if one.measure in names]


def groups_of(table: pd.DataFrame, axes: Sequence[str], measure: str) -> list[str]:
    """The axes that tell apart what was measured, without the seed."""
    found = table[table["measure"] == measure]
    return [axis for axis in axes if axis != REPLICATE and found[axis].notna().any()]


def label_of(value: object) -> str:
    """The entry of an axis; a dash where there is none."""
    return value if isinstance(value, str) else "-"


def number_text(value: float) -> str:
    """A mean as tables show it; nothing where it is not known."""
    return "" if np.isnan(value) else f"{value:.4f}"


def interval_text(low: float, high: float) -> str:
    """An interval as tables show it; nothing where it is not known."""
    return "" if np.isnan(low) else f"{number_text(low)} to {number_text(high)}"


def summary(table: pd.DataFrame, axes: Sequence[str], shown: Shown) -> pd.DataFrame:
    """One row for each combination of the axes other than the seed, in the order of the table.

    A cell that serves several combinations of one group counts once.

    Args:
        table: As `results_table` gives it.
        axes: Of the study's grid.
        shown: Which measure.

    Returns:
        The axes, `mean`, `low` and `high` (Student's 95 % interval over runs; missing for one),
        `runs`, and `beside`: the mean of what stands beside the measure.
    """
    groups = groups_of(table, axes, shown.measure)
    keys = ["cell", *groups]
    runs = table[table["measure"] == shown.measure].drop_duplicates(keys)
    beside = table[table["measure"] == shown.beside].drop_duplicates(keys)
    runs = runs.merge(beside[[*keys, "value"]].rename(columns={"value": "beside"}), "left", keys)
    rows = []
    parts = runs.groupby(groups, sort=False, dropna=False) if groups else [((), runs)]
    for labels, part in parts:
        low, high = _interval(part["value"].to_numpy())
        rows.append(
            {
                **dict(zip(groups, labels, strict=True)),
                "mean": part["value"].mean(),
                "low": low,
                "high": high,
                "runs": len(part),
                "beside": part["beside"].mean(),
            }
        )
    found = pd.DataFrame(rows, columns=[*groups, *MEANS])
    order = {axis: list(table[axis].unique()) for axis in groups}  # as in the study file
    return (
        found.sort_values(groups, key=lambda axis: axis.map(order[axis.name].index), kind="stable")
        if groups
        else found
    )


def _interval(values: np.ndarray) -> tuple[float, float]:
    """Student's 95 % interval of the mean; NaN from a single value."""
    if len(values) < 2:
        return np.nan, np.nan
    error = stats.sem(values)
    if error == 0:  # for which Student's interval is not defined
        return float(values[0]), float(values[0])
    low, high = stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=error)
    return float(low), float(high)


def agreement_texts(
    table: pd.DataFrame, axes: Sequence[str]
) -> tuple[list[str], list[tuple[list[str], list[str]]]]:
    """How far rankings agree that differ in one axis, as tables show it: means over pairs.

    Args:
        table: As `agreement_table` gives it.
        axes: Of the study's grid.

    Returns:
        What groups the rows; and for each row the labels of its group and the texts of AGREEMENT.
    """
    means = agreement_means(table, axes, REPLICATE)
    groups = [axis for axis in axes if axis != REPLICATE and means[axis].notna().any()]
    rows = []
    for row in means.to_dict("records"):
        pair = f"{row['differs']}: {row['first']}, {row['second']}"
        labels = [pair, *(label_of(row[group]) for group in groups)]
        share, pairs = f"{100 * row['best']:g} %", str(row["pairs"])
        rows.append((labels, [share, *_agreement_numbers(row), pairs]))
    return ["differ in", *groups], rows


def _agreement_numbers(row: Mapping[Hashable, Any]) -> list[str]:
    """Jaccard, its range, chance and tau; a dash for each where a ranking ranks nothing."""
    if np.isnan(row["jaccard"]):
        return ["-"] * 4
    return [
        f"{row['jaccard']:.2f}",
        f"{row['lowest']:.2f} to {row['highest']:.2f}",
        f"{row['chance_jaccard']:.2f}",
        f"{row['tau']:.2f}",
    ]
