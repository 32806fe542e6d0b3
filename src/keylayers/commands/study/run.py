# SPDX-License-Identifier: Apache-2.0
"""Run the cells of a study in an order that their needs allow, and record how each went."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from keylayers.commands.study.cell import CellState, save_state, state_of
from keylayers.commands.study.plan import Cell
from keylayers.commands.study.workers import Workers
from keylayers.errors import OutputError
from keylayers.files import WHAT_TO_DO, says_full

TICK_SECONDS = 0.5

OnChange = Callable[[Mapping[str, CellState]], None]


def run_cells(
    root: Path, cells: Sequence[Cell], workers: Workers, on_change: OnChange
) -> dict[str, CellState]:
    """Run every cell that is not finished, as many side by side as there are workers.

    Args:
        root: Folder of the study.
        cells: Each after those that it needs.
        workers: Where they are run.
        on_change: Told of the state of every cell, by name, again and again.

    Returns:
        How each cell ended, by name.

    Raises:
        OutputError: the disk is full.
    """
    states = states_at_start(root, cells)
    by_name = {cell.name: cell for cell in cells}
    running: set[str] = set()
    try:
        while True:
            _skip(cells, states)
            for cell in _ready(cells, states):
                if not workers.has_room():
                    break
                workers.begin(root, cell)
                states[cell.name] = CellState("running")
                running.add(cell.name)
            on_change(states)
            if not running:
                return states
            for name, state in workers.finished(TICK_SECONDS).items():
                running.remove(name)
                states[name] = state
                if state.status == "failed":  # its process may have had no time to say so
                    _stop_if_full(root, state)
                    with contextlib.suppress(OSError, OutputError):  # of this cell alone
                        save_state(root, by_name[name], state)
    finally:
        workers.close()


def _stop_if_full(root: Path, state: CellState) -> None:
    """On a full disk every other cell would fail too."""
    if says_full(state.error):
        raise OutputError(f"the disk must have room for {str(root)!r}, {WHAT_TO_DO}")


def states_at_start(root: Path, cells: Sequence[Cell]) -> dict[str, CellState]:
    """Cell name -> what is finished already; all that is not is to be done."""
    found = {cell.name: state_of(root, cell) for cell in cells}
    return {
        name: state if state.status == "finished" else CellState() for name, state in found.items()
    }


def _ready(cells: Sequence[Cell], states: Mapping[str, CellState]) -> list[Cell]:
    return [
        cell
        for cell in cells
        if states[cell.name].status == "waiting"
        and all(states[name].status == "finished" for name in cell.needs)
    ]


def _skip(cells: Sequence[Cell], states: dict[str, CellState]) -> None:
    """Give up on cells whose needs have failed; cells stand after those that they need."""
    for cell in cells:
        lost = [name for name in cell.needs if states[name].status in ("failed", "skipped")]
        if lost and states[cell.name].status == "waiting":
            states[cell.name] = CellState("skipped", f"needs {lost[0]}, which is not there")
