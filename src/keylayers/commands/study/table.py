# SPDX-License-Identifier: Apache-2.0
"""The results of a study as one tidy table: a row for each measure of each combination.

Columns: `cell`, `kind`, `status`, `error`, the axes of the grid, `measure`, `value`, `unit`. A cell
that serves several combinations has rows for each; one without a result has one row and no measure.
Needs no torch.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from keylayers.commands.study.cell import CellState, folder_of
from keylayers.commands.study.plan import TUNED, Cell
from keylayers.evaluation.record import Evaluation
from keylayers.files import RECORD, write_bytes
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.verification import Verification, verification_file

FIXED = ("cell", "kind", "status", "error")
MEASURED = ("measure", "value", "unit")
OF_BASE = ", base model"  # ends the name of what an evaluation measured on it


@dataclass(frozen=True)
class Measure:
    """One number of one cell.

    Attributes:
        name: What was measured.
        value: The number.
        unit: What it counts.
    """

    name: str
    value: float
    unit: str


def results_table(
    root: Path, cells: Sequence[Cell], states: Mapping[str, CellState], axes: Sequence[str]
) -> pd.DataFrame:
    """All that the cells of a study measured.

    Args:
        root: Folder of the study.
        cells: Its cells.
        states: How far each is.
        axes: Of the grid, in their order.
    """
    rows: list[dict[str, Any]] = []
    for cell in cells:
        state = states[cell.name]
        found = list(_measures(root, cell, state)) if state.status == "finished" else []
        for point in cell.points:
            fixed: dict[str, Any] = {"cell": cell.name, "kind": cell.kind, "status": state.status}
            fixed |= {"error": state.error or None, **point}
            if not found:
                rows.append(fixed)
            rows += [
                {**fixed, "measure": one.name, "value": one.value, "unit": one.unit}
                for one in found
            ]
    table = pd.DataFrame(rows, columns=[*FIXED, *axes, *MEASURED])
    return table.astype({"value": "float64"})


def write_table(root: Path, table: pd.DataFrame) -> None:
    """Write results.csv and results.parquet, each whole or not at all.

    Raises:
        OutputError: the place cannot be written.
    """
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    write_bytes(root / "results.parquet", buffer.getvalue())
    write_bytes(root / "results.csv", table.to_csv(index=False).encode("utf-8"))


def _measures(root: Path, cell: Cell, state: CellState) -> Iterator[Measure]:
    folder = folder_of(root, cell)
    yield Measure("wall_time", state.seconds, "seconds")
    if cell.kind == "training":
        yield from _of_training(folder / TUNED)
    elif cell.kind == "evaluation":
        yield from _of_evaluation(folder)
    elif cell.kind == "verification":
        yield from _of_verification(folder)
    else:
        yield from _of_ranking(folder, cell.kind == "stage-1")


def _of_ranking(folder: Path, is_stage_1: bool) -> Iterator[Measure]:
    made_by = Ranking.load(folder).made_by
    stage_1, losses, mask = made_by.stage_1, made_by.held_out_loss_nats, made_by.mask
    if is_stage_1:
        assert stage_1 is not None
        assert losses is not None
        yield Measure("steps", float(stage_1.num_steps), "steps")
        yield Measure("held_out_loss_base", losses.base, made_by.loss_unit)
        yield Measure("held_out_loss_tuned", losses.tuned, made_by.loss_unit)
        return
    assert mask is not None
    yield Measure("scoring_time", mask.seconds, "seconds")
    passes = float(mask.num_forward + mask.num_backward)
    yield Measure("scoring_passes", passes, "passes over a batch")


def _of_verification(folder: Path) -> Iterator[Measure]:
    found = Verification.load(verification_file(folder))
    unit = "normalised area: 0 all updates, 1 none"
    if found.best_first.normalised_area is not None:
        yield Measure("area", found.best_first.normalised_area, unit)
    random_area = found.random_area()
    if random_area is not None:
        yield Measure("area_of_random_orders", random_area[0], unit)


def _of_training(folder: Path) -> Iterator[Measure]:
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    unit = str(record.get("loss_unit", "nats"))
    base, selected, *others = record["results"]
    yield Measure("held_out_loss", selected["held_out_loss_nats"], unit)
    yield Measure("held_out_loss_base", base["held_out_loss_nats"], unit)
    for row in others:
        name, _, more = row["label"].partition(" (")
        if not more.startswith("stage 1"):  # that is in stage 1's own rows
            yield Measure(f"held_out_loss_{name}", row["held_out_loss_nats"], unit)
    yield Measure("modules", float(selected["num_modules"]), "modules")
    yield Measure("trained_parameters", float(selected["num_trained_parameters"]), "parameters")


def _of_evaluation(folder: Path) -> Iterator[Measure]:
    """What was trained, its base model, and what guessing gives where that is known."""
    found = Evaluation.load(folder)
    for measure in found.measures:
        if not measure.is_in_table:
            continue
        name = f"{measure.task}: {measure.metric}"
        better = {True: "higher is better", False: "lower is better", None: ""}
        unit = better[measure.higher_is_better]
        for result in measure.results:
            is_base = found.models[result.model]["kind"] == "base"
            yield Measure(f"{name}{OF_BASE}" if is_base else name, float(result.value), unit)
        if measure.chance is not None:
            yield Measure(f"{name}, chance", float(measure.chance), unit)
