# SPDX-License-Identifier: Apache-2.0
"""A study in the terminal: its cells while they run, and what it found."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import pandas as pd
from rich.console import Group
from rich.table import Table
from rich.text import Text

from keylayers.commands.study.cell import CellState, Status
from keylayers.commands.study.plan import Cell
from keylayers.commands.study.summary import (
    AGREEMENT,
    AGREEMENT_TITLE,
    Shown,
    agreement_texts,
    groups_of,
    interval_text,
    label_of,
    number_text,
    shown_in,
    summary,
)
from keylayers.commands.study.yaml_file import visible

STATUSES: tuple[Status, ...] = ("finished", "running", "waiting", "failed", "skipped")


def progress_table(
    cells: Sequence[Cell], states: Mapping[str, CellState], last_line: Callable[[Cell], str]
) -> Group:
    """How many cells of each kind are how far, what runs and says what, and what failed."""
    counts = Table(box=None, pad_edge=False)
    counts.add_column("cells")
    for status in STATUSES:
        counts.add_column(status, justify="right")
    for kind in dict.fromkeys(cell.kind for cell in cells):
        of_kind = Counter(states[cell.name].status for cell in cells if cell.kind == kind)
        counts.add_row(kind, *(str(of_kind[status]) for status in STATUSES))
    running = [cell for cell in cells if states[cell.name].status == "running"]
    lines = (Text(f"{cell.name}: {visible(last_line(cell))}", style="dim") for cell in running)
    return Group(counts, *lines)


def outcome_line(cell: Cell, state: CellState) -> str:
    """How a cell ended, in one line."""
    why = f": {visible(state.error)}" if state.error else f" after {state.seconds:.0f} s"
    return f"{cell.name} ({serves_text(cell)}) {state.status}{why}"


def summary_tables(table: pd.DataFrame, axes: Sequence[str]) -> list[Table]:
    """What was found: for each measure the means over seeds, with 95 % intervals."""
    return [_summary_table(table, axes, one) for one in shown_in(table)]


def agreement_summary(table: pd.DataFrame, axes: Sequence[str]) -> Table:
    """How far rankings agree that differ in one axis: means over pairs, beside chance."""
    groups, rows = agreement_texts(table, axes)
    shown = Table(box=None, pad_edge=False, title=AGREEMENT_TITLE, title_justify="left")
    for group in groups:
        shown.add_column(Text(group))
    for name in AGREEMENT:
        shown.add_column(name, justify="right")
    for labels, numbers in rows:
        shown.add_row(*map(Text, labels), *numbers)
    return shown


def _summary_table(table: pd.DataFrame, axes: Sequence[str], one: Shown) -> Table:
    groups = groups_of(table, axes, one.measure)
    shown = Table(box=None, pad_edge=False, title=one.title, title_justify="left")
    for group in groups:
        shown.add_column(Text(group))
    for name in ("mean", "95 % interval", "runs", one.reference):
        shown.add_column(name, justify="right")
    for row in summary(table, axes, one).to_dict("records"):
        shown.add_row(
            *(Text(label_of(row[group])) for group in groups),
            f"{row['mean']:.4f}",
            interval_text(row["low"], row["high"]),
            str(row["runs"]),
            number_text(row["beside"]),
        )
    return shown


def serves_text(cell: Cell) -> str:
    """Which combinations a cell belongs to: the first, and how many more."""
    first = " ".join(f"{axis}={label}" for axis, label in cell.points[0].items())
    more = len(cell.points) - 1
    return f"{first} and {more} more" if more else first
