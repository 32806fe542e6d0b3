# SPDX-License-Identifier: Apache-2.0
"""How far the rankings of a study agree that differ in one axis alone. Needs no torch.

One row for each such pair and budget. Columns: `differs` (the axis), `first` and `second` (its two
entries), the other axes, `best` (the share of the modules), and what `keylayers compare` says of
the pair, or nothing where one of them ranks nothing (all scores are equal): its best modules are
then the model's first. Pairs that differ in their seed show how much of any disagreement is noise.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pandas as pd

from keylayers.commands.study.cell import CellState, folder_of
from keylayers.commands.study.plan import Cell, Point
from keylayers.ranking.compare import agreement
from keylayers.ranking.ranking import Ranking

PAIR = ("differs", "first", "second")
MEASURES = ("jaccard", "chance_jaccard", "tau", "top_weighted_tau")


def agreement_table(
    root: Path,
    cells: Sequence[Cell],
    states: Mapping[str, CellState],
    axes: Sequence[str],
    budgets: Sequence[float],
) -> pd.DataFrame:
    """Every pair of finished rankings that differ in one axis, at every budget.

    Args:
        root: Folder of the study.
        cells: Its cells.
        states: How far each is.
        axes: Of the grid, in their order.
        budgets: Shares of the modules at which selections are compared.

    Raises:
        RankingError: two rankings cannot be compared.
    """
    found = [
        (point, Ranking.load(folder_of(root, cell)))
        for cell in cells
        if cell.kind == "ranking" and states[cell.name].status == "finished"
        for point in cell.points
    ]
    rows: list[dict[str, Any]] = []
    for (one, ranking), (other, ranking_of_other) in combinations(found, 2):
        differing = [axis for axis in one if one[axis] != other[axis]]
        if len(differing) == 1:
            rankings = (ranking, ranking_of_other)
            rows += _rows_of_pair(differing[0], (one, other), rankings, budgets)
    return pd.DataFrame(rows, columns=[*PAIR, *axes, "best", *MEASURES])


def agreement_means(table: pd.DataFrame, axes: Sequence[str], replicate: str) -> pd.DataFrame:
    """The mean of each measure over pairs, and the range of Jaccard.

    One row for each differing axis, its two entries (seeds are taken together), the other axes but
    for the seed, and the budget; in the order of the table.

    Args:
        table: As `agreement_table` gives it.
        axes: Of the study's grid.
        replicate: The axis whose entries are runs of the same thing.
    """
    of_seeds = table["differs"] == replicate
    shown = table.assign(
        first=table["first"].mask(of_seeds, "one"), second=table["second"].mask(of_seeds, "another")
    )
    keys = [*PAIR, *(axis for axis in axes if axis != replicate), "best"]
    means = (
        shown.groupby(keys, sort=False, dropna=False)
        .agg(
            pairs=("jaccard", "size"),
            jaccard=("jaccard", "mean"),
            lowest=("jaccard", "min"),
            highest=("jaccard", "max"),
            chance_jaccard=("chance_jaccard", "mean"),
            tau=("tau", "mean"),
        )
        .reset_index()
    )
    return means.sort_values(
        ["differs", "best"],
        key=lambda column: column.map(list(axes).index) if column.name == "differs" else column,
        kind="stable",
    )


def _rows_of_pair(
    axis: str,
    points: tuple[Point, Point],
    rankings: tuple[Ranking, Ranking],
    budgets: Sequence[float],
) -> Iterator[dict[str, Any]]:
    first, second = points
    shared = {name: label for name, label in first.items() if name != axis}
    ranks_nothing = any(ranking.is_flat for ranking in rankings)
    for budget in budgets:
        (found,) = agreement(rankings, budget, has_intervals=False)
        yield {
            **dict(zip(PAIR, (axis, first[axis], second[axis]), strict=True)),
            **shared,
            "best": budget,
            **{name: math.nan if ranks_nothing else getattr(found, name) for name in MEASURES},
        }
