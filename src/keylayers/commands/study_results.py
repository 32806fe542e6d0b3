# SPDX-License-Identifier: Apache-2.0
"""The results of a study: one tidy table, agreement of rankings, means over seeds, an HTML page.

A cell that serves several combinations of the grid has rows for each. Needs no torch.
"""

import base64
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from scipy import stats

from keylayers.commands.study_cells import CELLS, Cell
from keylayers.commands.study_grid import Study
from keylayers.commands.study_workers import State
from keylayers.environment import environment
from keylayers.files import write_bytes, write_json, write_text
from keylayers.ranking.compare import agreement
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import MadeBy, RunRecord

FIXED, MEASURED = ["cell", "kind", "status", "error"], ["measure", "value", "unit"]
PAIR, AGREED = ["differs", "first", "second"], ["jaccard", "chance_jaccard", "tau"]
COLUMNS = (*FIXED, *MEASURED, *PAIR, "best", *AGREED, "top_weighted_tau")
SEED = "seed"  # the axis whose entries repeat the same run
# Measure -> its reference in summaries; a measure of an evaluation has its base model.
REFERENCES = {"area": "area_of_random_orders", "held_out_loss": "held_out_loss_base"}
BASE = ", base model"
AREA = "normalised area: 0 all updates, 1 none"
BETTER = {True: "higher is better", False: "lower is better", None: ""}
FORMAT: dict[str, Any] = {"index": False, "float_format": "%.4f", "na_rep": "-"}
HEAD = """<!doctype html><html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
img-src data:; base-uri 'none'; form-action 'none'">
<title>Study</title><style>{}</style></head><body><main><h1>A study of {} cells</h1>"""


def write_results(
    folder: Path, root: Path, study: Study, cells: Sequence[Cell], states: Mapping[str, State]
) -> None:
    """Write the tables and the page of one study file, and print the means."""
    folder.mkdir(parents=True, exist_ok=True)
    axes = list(study.grid)
    record = {"environment": environment(), **study.model_dump(), "grid": study.axes}
    names = ("kind", "key", "options", "words", "needs", "points")
    record["cells"] = [{name: getattr(cell, name) for name in names} for cell in cells]
    write_json(folder / "study.json", record)
    table = results_table(root, cells, states, axes)
    write_bytes(folder / "results.parquet", table.to_parquet(index=False))
    write_text(folder / "results.csv", table.to_csv(index=False))
    parts = _summaries(table, axes)
    if study.compare:
        agreed = agreement_table(root, cells, states, axes, study.compare)
        write_text(folder / "agreement.csv", agreed.to_csv(index=False))
        parts["Agreement of rankings"] = agreement_means(agreed, axes)
    for title, means in parts.items():
        sys.stdout.write(f"{title}\n{means.to_string(**FORMAT)}\n\n")
    if all(find_spec(name) is not None for name in ("altair", "vl_convert")):
        write_bytes(folder / "report.html", _page(parts, table, cells))
    sys.stdout.write(f"results written to {folder}\n")


def results_table(
    root: Path, cells: Sequence[Cell], states: Mapping[str, State], axes: Sequence[str]
) -> pd.DataFrame:
    """Everything that the cells of a study measured; a cell without a result has one row."""
    rows: list[dict[str, Any]] = []
    for cell in cells:
        state = states[cell.name]
        measures: list[tuple[Any, ...]] = [()]
        if state.status == "finished":
            content = json.loads((root / CELLS / cell.name / cell.result).read_text("utf-8"))
            measures = [("wall_time", state.seconds, "seconds"), *_measures(cell.kind, content)]
        fixed = zip(FIXED, (cell.name, cell.kind, state.status, state.error or None), strict=True)
        row = dict(fixed)
        for point in cell.points:
            own = {**row, **point}
            rows += [own | dict(zip(MEASURED, one, strict=False)) for one in measures]
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
    root: Path,
    cells: Sequence[Cell],
    states: Mapping[str, State],
    axes: Sequence[str],
    fractions: Sequence[float],
) -> pd.DataFrame:
    """Agreement of each two rankings that differ in one axis, at each fraction of the modules.

    Pairs that differ in the seed are the ceiling for the others. Measures are empty where a ranking
    gives all modules the same score.
    """
    rankings = [
        (point, Ranking.load(root / CELLS / cell.name))
        for cell in cells
        if cell.kind == "ranking" and states[cell.name].status == "finished"
        for point in cell.points
    ]
    rows = []
    for (first, ranking), (second, other) in combinations(rankings, 2):
        differing = [axis for axis in axes if first.get(axis) != second.get(axis)]
        for axis in differing if len(differing) == 1 else ():
            pair = dict(zip(PAIR, (axis, first.get(axis), second.get(axis)), strict=True))
            shared = {name: label for name, label in first.items() if name != axis}
            is_flat = ranking.is_flat or other.is_flat
            for best in fractions:
                (found,) = agreement([ranking, other], best, has_intervals=False)
                values = {} if is_flat else {name: getattr(found, name) for name in COLUMNS[-4:]}
                rows.append({**pair, **shared, "best": best, **values})
    return pd.DataFrame(rows, columns=[*PAIR, *axes, *COLUMNS[-5:]])


def agreement_means(table: pd.DataFrame, axes: Sequence[str]) -> pd.DataFrame:
    """The agreement table with means over pairs; pairs of seeds are taken together."""
    of_seeds = table["differs"] == SEED
    groups = [axis for axis in axes if axis != SEED and table[axis].notna().any()]
    pairs = table.assign(**{name: table[name].mask(of_seeds, "any") for name in PAIR[1:]})
    pairs[groups] = pairs[groups].fillna("-")
    by = pairs.groupby([*PAIR, *groups, "best"], sort=False)
    extremes = by["jaccard"].agg(["min", "max", "size"])
    return by[AGREED].mean().join(extremes).reset_index().rename(columns={"size": "pairs"})


def _summaries(table: pd.DataFrame, axes: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Measure -> its mean over seeds with half of Student's 95 % interval, and its reference."""
    names = set(table["measure"].dropna())
    evaluated = {
        name: name + BASE for name in table["measure"].unique() if f"{name}{BASE}" in names
    }
    found = {}
    for measure, reference in (REFERENCES | evaluated).items():
        rows = table[table["measure"].isin([measure, reference])]
        groups = [axis for axis in axes if axis != SEED and rows[axis].notna().any()] or ["kind"]
        rows = rows.drop_duplicates(["cell", "measure", *groups])
        rows = rows.assign(**{group: rows[group].fillna("-") for group in groups})
        by = rows.groupby(["measure", *groups], sort=False)["value"].agg(["mean", "sem", "size"])
        if measure in names:
            means = by.loc[measure]
            means["±"] = stats.t.ppf(0.975, means["size"] - 1) * means["sem"]
            means[reference] = by["mean"].get(reference, math.nan)
            means = means.drop(columns="sem").rename(columns={"size": "runs"})
            found[measure] = means.reset_index()
    return found


def _page(parts: Mapping[str, pd.DataFrame], table: pd.DataFrame, cells: Sequence[Cell]) -> bytes:
    """The same as one HTML file that opens offline, runs no script and loads nothing."""
    from keylayers.report.charts import means_chart
    from keylayers.report.figures import drawn_chart

    style = files("keylayers.report").joinpath("page", "page.css").read_text(encoding="utf-8")
    body = [HEAD.format(style, len(cells))]
    for name, means in parts.items():
        body.append(f"<h2>{escape(name)}</h2>")
        runs = table[table["measure"] == name].dropna(subset="value")
        if len(runs):
            image = base64.b64encode(drawn_chart(means_chart(name, runs, means), ".png")).decode()
            body.append(f'<img alt="the table below" src="data:image/png;base64,{image}">')
        body.append(means.to_html(**FORMAT))
    lost = table[table["status"] != "finished"][FIXED]
    body += ["<h2>Without a result</h2>", lost.to_html(**FORMAT)] if len(lost) else []
    commands = "\n".join(f"keylayers {shlex.join(cell.words)}" for cell in cells)
    body.append(f"<h2>Commands</h2><pre>{escape(commands)}</pre></main></body></html>")
    return "".join(body).encode("utf-8", "replace")
