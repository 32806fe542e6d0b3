# SPDX-License-Identifier: Apache-2.0
"""One cell of a study on disk: its folder, its record, and how it is run. Needs no torch."""

import contextlib
import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from keylayers.commands.study.plan import CELLS, TUNED, Cell
from keylayers.evaluation.record import EVALUATION
from keylayers.files import RECORD as TRAINED
from keylayers.files import write_json
from keylayers.ranking.ranking import FILE as RANKING
from keylayers.ranking.verification import FILE as VERIFICATION

Status = Literal["waiting", "running", "finished", "failed", "skipped"]
RunCommand = Callable[[Sequence[str]], int]

RECORD = "cell.json"
# Kind of a cell -> the file without which there is no result.
RESULTS = {
    "stage-1": RANKING,
    "ranking": RANKING,
    "verification": VERIFICATION,
    "training": f"{TUNED}/{TRAINED}",
    "evaluation": EVALUATION,
}
LOG = "log.txt"
PREFIX = "keylayers: "  # of the one line that says what is wrong


@dataclass(frozen=True)
class CellState:
    """What is known of a cell.

    Attributes:
        status: `failed` cells are tried again by the next run.
        error: Why it failed, or which cell it waits for in vain; empty otherwise.
        seconds: Wall time of its commands so far.
        num_done: Commands that are finished.
    """

    status: Status = "waiting"
    error: str = ""
    seconds: float = 0.0
    num_done: int = 0


def state_of(root: Path, cell: Cell) -> CellState:
    """What an earlier run left of a cell.

    What cannot be read counts as not begun, and so does a finished cell whose results are gone.
    """
    folder = folder_of(root, cell)
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        state = CellState(**record["state"])
    except (OSError, ValueError, KeyError, TypeError):
        return CellState()
    is_there = (folder / RESULTS.get(cell.kind, RECORD)).is_file()
    return state if is_there or state.status != "finished" else CellState()


def folder_of(root: Path, cell: Cell) -> Path:
    """Where a cell's results are."""
    return root / CELLS / cell.name


def run_cell(root: Path, cell: Cell, run_command: RunCommand) -> CellState:
    """Run the commands of a cell that are not finished, and record how that went.

    What they print goes to log.txt in the cell's folder. A failure is recorded, whatever it is.

    Args:
        root: Folder of the study.
        cell: Its needs are finished.
        run_command: Runs the words of a command and returns its exit code.
    """
    folder = folder_of(root, cell)
    folder.mkdir(parents=True, exist_ok=True)
    state = state_of(root, cell)
    for number in range(state.num_done, len(cell.commands)):
        start = time.perf_counter()
        error = _run(folder, _with_output(folder, cell.commands[number]), run_command)
        seconds = state.seconds + time.perf_counter() - start
        if error:
            state = CellState("failed", error, seconds, number)
            break
        is_last = number + 1 == len(cell.commands)
        state = CellState("finished" if is_last else "running", "", seconds, number + 1)
        if not is_last:
            save_state(root, cell, state)
    save_state(root, cell, state)
    return state


def save_state(root: Path, cell: Cell, state: CellState) -> None:
    """Record a cell's state in its folder."""
    record: dict[str, Any] = {
        "kind": cell.kind,
        "key": cell.key,
        "commands": [list(command) for command in cell.commands],
        "needs": list(cell.needs),
        "state": asdict(state),
    }
    folder_of(root, cell).mkdir(parents=True, exist_ok=True)
    write_json(folder_of(root, cell) / RECORD, record)


def failed(root: Path, cell: Cell, error: str) -> CellState:
    """The state of a cell whose worker could not say how it went: what was finished stays so."""
    return replace(state_of(root, cell), status="failed", error=error)


def last_line(root: Path, cell: Cell) -> str:
    """What a running cell said last."""
    with contextlib.suppress(OSError):
        lines = (folder_of(root, cell) / LOG).read_text(encoding="utf-8").splitlines()
        return next((line for line in reversed(lines) if line.strip()), "")
    return ""


def _with_output(folder: Path, command: Sequence[str]) -> list[str]:
    """The command with the place of its results."""
    place = folder / TUNED if command[0] == "train" else folder
    return [*command, "--output", str(place)]


def _run(folder: Path, words: Sequence[str], run_command: RunCommand) -> str:
    """Why a command failed; empty if it did not."""
    with (
        (folder / LOG).open("a", encoding="utf-8", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            code = run_command(words)
        except (Exception, SystemExit) as error:  # of whatever kind: the other cells go on
            traceback.print_exc()
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
    if code == 0:
        return ""
    lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
    told = [line.removeprefix(PREFIX) for line in lines if line.startswith(PREFIX)]
    return told[-1] if told else f"exit code {code}"
