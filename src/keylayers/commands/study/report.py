# SPDX-License-Identifier: Apache-2.0
"""A study as one HTML file that opens offline: charts and means by group, what failed, commands.

Runs no script and loads nothing: the charts are pictures inside the file.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import altair as alt
import pandas as pd
from markupsafe import Markup

from keylayers._version import __version__
from keylayers.commands.study.cell import CellState
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
from keylayers.report.charts import BLUE, GREY
from keylayers.report.figures import drawn_chart
from keylayers.report.html import page_environment

WIDTH, ROW_HEIGHT = 420, 22  # of a chart, in pixels
BETWEEN = " · "  # labels of the axes


@dataclass(frozen=True)
class Part:
    """What the page shows of one measure.

    Attributes:
        title: What was measured.
        beside: What stands beside it.
        groups: Axes of the table.
        columns: Those with numbers.
        rows: Labels of the groups, and the numbers as text.
        figure: The chart, PNG in base64: a browser has other fonts, which an SVG would clip.
    """

    title: str
    beside: str
    groups: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[tuple[list[str], list[str]]]
    figure: str


def render_study(
    table: pd.DataFrame,
    axes: Sequence[str],
    cells: Sequence[Cell],
    states: Mapping[str, CellState],
    agreement: pd.DataFrame | None = None,
) -> bytes:
    """The report of a study, as an HTML file.

    Args:
        table: As `results_table` gives it.
        axes: Of the study's grid.
        cells: Of the study.
        states: How each ended, by name.
        agreement: As `agreement_table` gives it, if rankings are compared.
    """
    finished = [cell for cell in cells if states[cell.name].status == "finished"]
    style = files("keylayers.report").joinpath("page", "page.css").read_text(encoding="utf-8")
    page = (
        page_environment("keylayers.commands.study")
        .get_template("study.html")
        .render(
            version=__version__,
            style=Markup(style),
            axes=axes,
            cells=cells,
            num_cells=len(cells),
            num_finished=len(finished),
            lost=[(cell, states[cell.name]) for cell in cells if cell not in finished],
            parts=[_part(table, axes, one) for one in shown_in(table)],
            agreement=_agreement(agreement, axes),
        )
    )
    return page.encode("utf-8", "replace")


def _agreement(table: pd.DataFrame | None, axes: Sequence[str]) -> dict[str, Any] | None:
    """The table of agreement, as text; None if there are no pairs."""
    if table is None or table.empty:
        return None
    groups, rows = agreement_texts(table, axes)
    return {"title": AGREEMENT_TITLE, "groups": groups, "columns": AGREEMENT, "rows": rows}


def _part(table: pd.DataFrame, axes: Sequence[str], shown: Shown) -> Part:
    means = summary(table, axes, shown)
    groups = groups_of(table, axes, shown.measure)
    rows = [
        (
            [label_of(row[group]) for group in groups],
            [
                number_text(row["mean"]),
                interval_text(row["low"], row["high"]),
                str(row["runs"]),
                number_text(row["beside"]),
            ],
        )
        for row in means.to_dict("records")
    ]
    figure = drawn_chart(_chart(table, means, groups, shown), ".png")
    return Part(
        shown.title,
        shown.reference,
        groups,
        ("mean", "95 % interval", "runs", shown.reference),
        rows,
        base64.b64encode(figure).decode(),
    )


def _chart(
    table: pd.DataFrame, means: pd.DataFrame, groups: Sequence[str], shown: Shown
) -> alt.LayerChart:
    """A row for each group: its runs as dots, their mean as a bar, the reference in grey."""

    def name(row: Mapping[Any, Any]) -> str:
        return BETWEEN.join(label_of(row[group]) for group in groups) or "all"

    order = [name(row) for row in means.to_dict("records")]
    runs = [
        {"group": name(row), "value": row["value"]}
        for row in table[table["measure"] == shown.measure].to_dict("records")
    ]
    bars = [
        {
            "group": name(row),
            "value": row["mean"],
            "beside": None if pd.isna(row["beside"]) else row["beside"],
        }
        for row in means.to_dict("records")
    ]
    y = alt.Y("group:N", sort=order, title=None, axis=alt.Axis(labelLimit=420))
    x = alt.X("value:Q", title=shown.title, scale=alt.Scale(zero=False))
    mean = alt.Chart(alt.InlineData(values=bars))
    return alt.layer(
        mean.transform_filter("isValid(datum.beside)")
        .mark_tick(color=GREY, thickness=3, size=14)
        .encode(y=y, x=alt.X("beside:Q")),
        mean.mark_tick(color=BLUE, thickness=2, size=16).encode(y=y, x=x),
        alt.Chart(alt.InlineData(values=runs))
        .mark_circle(color=BLUE, size=45, opacity=0.6)
        .encode(y=y, x=x),
    ).properties(width=WIDTH, height=ROW_HEIGHT * max(1, len(order)))
