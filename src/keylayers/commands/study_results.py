# SPDX-License-Identifier: Apache-2.0
"""The results of a study: one tidy table, agreement of rankings, means over seeds, an HTML page.

A cell that serves several combinations of the grid has rows for each. Needs no torch.
"""

import base64
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from scipy import stats

from keylayers.commands.study_cells import Cell
from keylayers.commands.study_grid import Study
from keylayers.commands.study_workers import State
from keylayers.environment import environment
from keylayers.files import write_bytes, write_json, write_text
from keylayers.ranking.compare import agreement
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import MadeBy, RunRecord
from keylayers.report.source import missing_for_charts
from keylayers.report.templates import page_templates

FIXED, MEASURED = ["cell", "kind", "status", "error"], ["measure", "value", "unit"]
PAIR, AGREED = ["differs", "first", "second"], ["jaccard", "chance_jaccard", "tau"]
AGREEMENT = ["best", *AGREED, "top_weighted_tau"]
COLUMNS = {*FIXED, *MEASURED, *PAIR, *AGREEMENT}
SEED = "seed"  # the axis whose entries repeat the same run
# Measure -> its reference in summaries; a measure of an evaluation has its base model.
REFERENCES = {"area": "area_of_random_orders", "held_out_loss": "held_out_loss_base"}
BASE = ", base model"
AREA = "normalised area: 0 all updates, 1 none"
BETTER = {True: "higher is better", False: "lower is better", None: ""}
FORMAT: dict[str, Any] = {"index": False, "float_format": "%.4f", "na_rep": "-"}


def write_results(
    folder: Path, study: Study, cells: Sequence[Cell], states: Mapping[str, State]
) -> None:
    """Write the tables and the page of one study file, and print the means."""
    folder.mkdir(parents=True, exist_ok=True)
    axes = list(study.grid)
    record = {"environment": environment(), **study.model_dump(), "grid": study.axes}
    write_json(folder / "study.json", record)
    table = results_table(cells, states, axes)
    write_bytes(folder / "results.parquet", table.to_parquet(index=False))
    write_text(folder / "results.csv", table.to_csv(index=False))
    means = _means(table, axes)
    if study.compare:
        finished = [cell for cell in cells if states[cell.name].status == "finished"]
        agreed = agreement_table(finished, axes, study.compare)
        write_text(folder / "agreement.csv", agreed.to_csv(index=False))
        means["Agreement of rankings"] = agreement_means(agreed, axes)
    for title, part in means.items():
        sys.stdout.write(f"{title}\n{part.to_string(**FORMAT)}\n\n")
    if not missing_for_charts():
        write_bytes(folder / "report.html", _page(means, table, cells))
    sys.stdout.write(f"results written to {folder}\n")


def results_table(
    cells: Sequence[Cell], states: Mapping[str, State], axes: Sequence[str]
) -> pd.DataFrame:
    """Everything that the cells of a study measured; a cell without a result has one row."""
    rows = []
    for cell in cells:
        state = states[cell.name]
        measures: list[tuple[Any, ...]] = [()]
        if state.status == "finished":
            content = json.loads(cell.result.read_text(encoding="utf-8"))
            measures = [("wall_time", state.seconds, "seconds"), *_measures(cell.kind, content)]
        fixed = (cell.name, cell.kind, state.status, state.error or None)
        rows += [
            {**point, **dict(zip((*FIXED, *MEASURED), (*fixed, *measure), strict=False))}
            for point in cell.points
            for measure in measures
        ]
    return pd.DataFrame(rows, columns=[*FIXED, *axes, *MEASURED]).astype({"value": "float64"})


def _measures(kind: str, content: Any) -> Iterator[tuple[str, float | None, str]]:
    """Name, value and unit of what a cell measured, from the file that it wrote."""
    if kind in ("stage-1", "ranking"):
        made_by = MadeBy.model_validate(content["provenance"])
        stage_1, losses, mask = made_by.stage_1, made_by.held_out_loss_nats, made_by.mask
        if kind == "ranking" and mask is not None:
            yield "scoring_time", mask.seconds, "seconds"
            yield "scoring_passes", mask.num_forward + mask.num_backward, "passes over a batch"
        elif kind == "stage-1" and stage_1 is not None and losses is not None:
            yield "steps", stage_1.num_steps, "steps"
            yield "held_out_loss_base", losses.base, made_by.loss_unit
            yield "held_out_loss_tuned", losses.tuned, made_by.loss_unit
    elif kind == "verification":
        areas = [curve["normalised_area"] for curve in content["random"]]
        yield "area", content["best_first"]["normalised_area"], AREA
        yield "area_of_random_orders", None if None in areas else fmean(areas), AREA
    elif kind == "training":
        record = RunRecord.model_validate(content)
        unit, (base, selected, *others) = record.loss_unit, record.results
        yield "held_out_loss", selected.held_out_loss_nats, unit
        yield "held_out_loss_base", base.held_out_loss_nats, unit
        for row in others:
            name, _, more = row.label.partition(" (")
            if not more.startswith("stage 1"):  # which has rows of its own
                yield f"held_out_loss_{name}", row.held_out_loss_nats, unit
        yield "modules", selected.num_modules, "modules"
        yield "trained_parameters", selected.num_trained_parameters, "parameters"
    elif kind == "evaluation":
        for measure in (one for one in content["measures"] if one["is_in_table"]):
            name = f"{measure['task']}: {measure['metric']}"
            unit = BETTER[measure["higher_is_better"]]
            for result in measure["results"]:
                is_base = content["models"][result["model"]]["kind"] == "base"
                yield name + (BASE if is_base else ""), result["value"], unit
            if measure["chance"] is not None:
                yield f"{name}, chance", measure["chance"], unit


def agreement_table(
    cells: Sequence[Cell], axes: Sequence[str], fractions: Sequence[float]
) -> pd.DataFrame:
    """Agreement of each two rankings that differ in one axis; empty if one ranks nothing."""
    ranked = [cell for cell in cells if cell.kind == "ranking"]
    rankings = {cell.name: Ranking.load(cell.folder) for cell in ranked}
    points = [(point, rankings[cell.name]) for cell in ranked for point in cell.points]
    rows = []
    for (first, ranking), (second, other) in combinations(points, 2):
        differing = [axis for axis in axes if first.get(axis) != second.get(axis)]
        if len(differing) != 1:
            continue
        (axis,) = differing
        pair = {"differs": axis, "first": first.get(axis), "second": second.get(axis)}
        shared = {name: label for name, label in first.items() if name != axis}
        for best in fractions:
            row = {**pair, **shared, "best": best}
            if not (ranking.is_flat or other.is_flat):
                (found,) = agreement([ranking, other], best, has_intervals=False)
                row |= {name: getattr(found, name) for name in AGREEMENT[1:]}
            rows.append(row)
    return pd.DataFrame(rows, columns=[*PAIR, *axes, *AGREEMENT])


def agreement_means(table: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """The agreement table with means over pairs; pairs of seeds are taken together."""
    of_seeds = table["differs"] == SEED
    pairs = table.assign(**{name: table[name].mask(of_seeds, "any") for name in PAIR[1:]})
    groups = [*PAIR, *_groups(table, axes), "best"]
    by = pairs.groupby(groups, sort=False, dropna=False)
    extremes = by["jaccard"].agg(["min", "max", ("pairs", "size")])
    return by[AGREED].mean().join(extremes).reset_index()


def _means(table: pd.DataFrame, axes: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Measure -> its mean over seeds with half of Student's 95 % interval, and its reference."""
    names = [*table["measure"].dropna().unique()]
    evaluated = {name: name + BASE for name in names if name + BASE in names}
    found = {}
    for measure, reference in (REFERENCES | evaluated).items():
        rows = table[table["measure"].isin([measure, reference])]
        groups = _groups(rows, axes) or ["kind"]
        rows = rows.drop_duplicates(["cell", "measure", *groups]).fillna(dict.fromkeys(groups, "-"))
        by = rows.groupby(["measure", *groups], sort=False)["value"].agg(["mean", "sem", "size"])
        if measure in names:
            means = by.loc[measure]
            means["±"] = stats.t.ppf(0.975, means["size"] - 1) * means["sem"]
            means[reference] = by["mean"].get(reference, math.nan)
            means = means.drop(columns="sem").rename(columns={"size": "runs"})
            found[measure] = means.reset_index()
    return found


def _groups(rows: pd.DataFrame, axes: Sequence[str]) -> list[str]:
    """The axes, apart from the seed, that tell rows apart."""
    return [axis for axis in axes if axis != SEED and rows[axis].notna().any()]


def _page(means: Mapping[str, pd.DataFrame], table: pd.DataFrame, cells: Sequence[Cell]) -> bytes:
    """The same as one HTML file that opens offline, runs no script and loads nothing."""
    from keylayers.report.charts import means_chart
    from keylayers.report.figures import drawn_chart

    parts = []
    for name, part in means.items():
        runs, image = table[table["measure"] == name].dropna(subset="value"), ""
        if len(runs):
            chart = means_chart(name, runs, part)
            image = base64.b64encode(drawn_chart(chart, ".png")).decode()
        parts.append((name, image, part.to_html(**FORMAT)))
    lost = table[table["status"] != "finished"][FIXED]
    if len(lost):
        parts.append(("Without a result", "", lost.to_html(**FORMAT)))
    template = page_templates(autoescape=True).get_template("study.html")
    page = template.render(parts=parts, commands=[cell.command for cell in cells])
    return page.encode("utf-8", "replace")
