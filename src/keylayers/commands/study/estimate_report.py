# SPDX-License-Identifier: Apache-2.0
"""The plan of a study in the terminal: its cells, and what they will cost by what assumptions."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from keylayers.commands.study.cell import CellState
from keylayers.commands.study.estimate import Estimate, downloads, estimate
from keylayers.commands.study.plan import Cell
from keylayers.commands.study.sizes import BYTES_PER_TOKEN
from keylayers.commands.study.tables import serves_text
from keylayers.errors import ConfigError
from keylayers.ranking.budget import GIB

TERA = 1e12
DEVICE_TFLOPS = 100.0  # about a third of an A100's peak in bfloat16
MINUTE, HOUR = 60, 3600
EVALUATIONS = (
    "Evaluations come on top: what they take depends on their tasks, whose data are not listed."
)

Estimates = Mapping[str, Estimate]
States = Mapping[str, CellState]


def print_plan(
    console: Console, cells: Sequence[Cell], states: States, device_tflops: float | None = None
) -> None:
    """Print every cell, sums by kind, downloads, and what all of it assumes.

    Args:
        console: Where to.
        cells: Each after those that it needs.
        states: What is finished already.
        device_tflops: What a device sustains, in 1e12 operations a second; `DEVICE_TFLOPS` if not
            given.

    Raises:
        ConfigError: it is not above zero.
    """
    tflops = DEVICE_TFLOPS if device_tflops is None else device_tflops
    if not 0 < tflops < float("inf"):
        raise ConfigError(f"`device_tflops` must be above 0, got {tflops:g}")
    found = {cell.name: estimate(cell) for cell in cells}
    num_finished = sum(states[cell.name].status == "finished" for cell in cells)
    console.print(_cell_table(cells, states, found, tflops))
    console.print(f"\n{len(cells)} cells, {num_finished} of them finished\n", highlight=False)
    console.print(_cost_table(cells, states, found, tflops))
    missing = dict.fromkeys(one.unknown for one in found.values() if one.unknown)
    if missing:
        console.print(f"not known: {', '.join(missing)}", highlight=False, markup=False)
    console.print()
    sources = downloads(cells)
    if sources:
        console.print(_download_table(sources))
        console.print()
    console.print(assumptions(tflops), highlight=False)
    if any(cell.kind == "evaluation" for cell in cells):
        console.print(EVALUATIONS, highlight=False)


def assumptions(tflops: float) -> str:
    """What the estimates rest on."""
    return (
        f"Estimates of what is still to do, one cell after another, on a device that sustains "
        f"{tflops:g} TFLOP/s (--device-tflops). Counted are the matrix products of the model; not "
        f"attention's own, the optimiser, padding, loading and tokenising. Every stage 1 is taken "
        f"to its cap of steps, a token to be {BYTES_PER_TOKEN} bytes of text, an example to be cut "
        f"at `max_length`. Memory is that of the largest batch, as measured on small Llama blocks "
        f"and scaled by width; `dtype` auto counts as bfloat16."
    )


def duration_text(seconds: float | None) -> str:
    """A time as plans show it; a dash where it is not known."""
    if seconds is None:
        return "-"
    if seconds < 0.05:
        return "< 0.1 s"
    if seconds < 2 * MINUTE:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 2 * HOUR:
        return f"{seconds / MINUTE:.0f} min"
    return f"{seconds / HOUR:.1f} h" if seconds < 100 * HOUR else f"{seconds / HOUR:,.0f} h"


def memory_text(num_bytes: float | None) -> str:
    """An amount of memory as plans show it; a dash where it is not known."""
    if num_bytes is None:
        return "-"
    gib = num_bytes / GIB
    return f"{gib:.2f} GiB" if gib < 10 else f"{gib:.0f} GiB"


def _cell_table(cells: Sequence[Cell], states: States, found: Estimates, tflops: float) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("cell", "serves", "needs"):
        table.add_column(title)
    for title in ("time", "memory"):
        table.add_column(title, justify="right")
    table.add_column("state")
    for cell in cells:
        one = found[cell.name]
        table.add_row(
            Text(cell.name),
            Text(serves_text(cell)),
            Text(", ".join(cell.needs)),
            duration_text(_seconds(one, tflops)),
            memory_text(one.peak_bytes),
            "finished" if states[cell.name].status == "finished" else "to do",
        )
    return table


def _cost_table(cells: Sequence[Cell], states: States, found: Estimates, tflops: float) -> Table:
    """How many cells of each kind, how many of them to do, for how long, with how much memory."""
    table = Table(box=None, pad_edge=False)
    table.add_column("kind")
    for title in ("cells", "to do", "not known", "time", "most memory"):
        table.add_column(title, justify="right")
    for kind in (*dict.fromkeys(cell.kind for cell in cells), "all"):
        own = [cell for cell in cells if kind in (cell.kind, "all")]
        to_do = [found[cell.name] for cell in own if states[cell.name].status != "finished"]
        known = [one for one in to_do if not one.unknown]
        table.add_row(
            kind,
            str(len(own)),
            str(len(to_do)),
            str(len(to_do) - len(known) or ""),
            duration_text(sum(_seconds(one, tflops) or 0 for one in known) if known else None),
            memory_text(max((one.peak_bytes or 0 for one in known), default=None)),
        )
    return table


def _download_table(sources: Mapping[str, int | None]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("from the hub, if it is not in its cache")
    table.add_column("size", justify="right")
    for name, num_bytes in sources.items():
        table.add_row(Text(name), _download_text(num_bytes))
    if len(sources) > 1:
        known = [one for one in sources.values() if one is not None]
        table.add_row(
            "all" if len(known) == len(sources) else "all whose size is known",
            _download_text(sum(known)),
        )
    return table


def _download_text(num_bytes: int | None) -> str:
    """In decimal units, as the hub shows it."""
    if num_bytes is None:
        return "not known"
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _seconds(one: Estimate, tflops: float) -> float | None:
    return None if one.operations is None else one.operations / (tflops * TERA)
