# SPDX-License-Identifier: Apache-2.0
"""`keylayers study`."""

import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from keylayers.commands.show import NEEDED
from keylayers.errors import ConfigError, StudyError

if TYPE_CHECKING:
    from keylayers.commands.study.cell import CellState
    from keylayers.commands.study.files import PlannedStudy
    from keylayers.commands.study.plan import Cell
    from keylayers.commands.study.workers import Workers

EXAMPLES = """Examples:

```
keylayers study study.yaml --dry-run
keylayers study study.yaml --output results
keylayers study study.yaml --output results --ray-address auto
keylayers study recipes/paper/*.yaml --dry-run
keylayers study recipes/small/*.yaml --set model=my-model --set data=[mine.jsonl]
```

A study file has the options that all runs share, and a grid of those that differ:

```
options:
  model: base
  max_steps: 100
grid:
  data: [chats.jsonl, code.jsonl]
  seed: [0, 1, 2]
  method: [elimination, ila, {method: ila, mask_optimizer: adam}]
  budget: [0.1, 0.3, 1.0]
verify: true
compare: [0.3, 0.75]
```
"""

app = App(help_epilogue=EXAMPLES, help_format="markdown")


@app.default
def study(
    *studies: Path,
    output: Path = Path("study"),
    settings: Annotated[tuple[str, ...], Parameter(name="--set")] = (),
    workers: int | None = None,
    ray_address: str | None = None,
    dry_run: bool = False,
    device_tflops: float | None = None,
) -> None:
    """Run every combination of models, data, seeds, methods and budgets, each once.

    Rankings of the same model, data and training share one stage 1. What is finished is never run
    again, what was stopped goes on, and what failed is recorded, left out and tried again by the
    next run. Writes results.parquet and results.csv, agreement.csv if rankings are compared, and
    report.html if charts are installed.

    Args:
        studies: YAML files with `options`, `grid` and what is measured. Several share their
            cells, and each has its results in a folder of its name.
        output: Folder of the study: its cells and its results.
        settings: Options that are given anew, as name=value, or the entries of an axis of the grid,
            as name=[value, value].
        workers: Runs at once. Not given: one for each accelerator, or for each core without one.
        ray_address: Address of a Ray cluster that shares this machine's files; auto finds one,
            local starts one here.
        dry_run: Only show what would be run, with estimates of time, memory and downloads.
        device_tflops: Of the estimates (--dry-run): what a device sustains, in 1e12 floating-point
            operations a second. Not given: 100, about a third of an A100's peak in bfloat16.
    """
    from rich.text import Text

    from keylayers.commands.config import read_yaml
    from keylayers.commands.console import stdout
    from keylayers.commands.study.files import plan_files, shared_cells
    from keylayers.commands.study.plan import study_record
    from keylayers.commands.study.run import run_cells, states_at_start

    if device_tflops is not None and not dry_run:
        raise ConfigError("`device_tflops` must be left out without `dry_run`: it has no effect")
    if not studies:
        raise ConfigError("at least one study file must be given, got none")
    planned = plan_files({path: read_yaml(path, "study") for path in studies}, output, settings)
    cells = shared_cells(planned)
    _check(cells)
    states = states_at_start(output, cells)
    num_finished = sum(state.status == "finished" for state in states.values())
    console = stdout()
    if dry_run:
        from keylayers.commands.study.estimate_report import print_plan

        print_plan(console, cells, states, device_tflops)
        return
    from keylayers.files import one_at_a_time, output_folder, write_json

    with output_folder(output), one_at_a_time(output):
        crew = _workers(workers, ray_address) if num_finished < len(cells) else None
        for one in planned:
            with output_folder(one.folder):
                write_json(one.folder / "study.json", study_record(one.study, one.cells))
        if crew is not None:
            with _Display(output, cells) as display:
                states = run_cells(output, cells, crew, display.show)
        for one in planned:
            if len(planned) > 1:
                console.rule(Text(one.name), align="left")
            _show_results(output, one, states)
    num_missing = sum(states[cell.name].status != "finished" for cell in cells)
    if num_missing:
        raise StudyError(
            f"every cell must finish, but {num_missing} of {len(cells)} did not; their errors are "
            f"in results.csv and their log.txt, and the same command tries them again"
        )


def _check(cells: "Sequence[Cell]") -> None:
    """Parse the commands before any is run; those that take over a ranking's options need it."""
    from keylayers.cli import app as commands
    from keylayers.commands.study.distinct import distinct_commands

    for words in distinct_commands(cells):
        commands.parse_args(words, print_error=False, exit_on_error=False)


def _workers(num_workers: int | None, ray_address: str | None) -> "Workers":
    from keylayers.cli import main
    from keylayers.commands.study.workers import (
        LocalWorkers,
        RayWorkers,
        local_devices,
        num_local_workers,
    )

    if num_workers is not None and num_workers < 1:
        raise ConfigError(f"`workers` must be at least 1, got {num_workers}")
    if ray_address is None:
        devices = local_devices()
        return LocalWorkers(main, num_workers or num_local_workers(devices), devices)
    if num_workers is not None:
        raise ConfigError("`workers` must be left out with `ray_address`: the cluster has its own")
    return RayWorkers(main, ray_address)


class _Display:
    """A live table in a terminal; elsewhere a line for each cell that ends."""

    def __init__(self, root: Path, cells: "Sequence[Cell]") -> None:
        from rich.console import Console
        from rich.live import Live

        self.root = root
        self.cells = cells
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.is_live = self.console.is_terminal
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.start = time.perf_counter()
        self.told: Mapping[str, str] = {}

    def show(self, states: "Mapping[str, CellState]") -> None:
        """Show the states of all cells."""
        from keylayers.commands.study.cell import last_line
        from keylayers.commands.study.tables import outcome_line, progress_table

        if self.is_live:
            shown = progress_table(self.cells, states, lambda cell: last_line(self.root, cell))
            self.live.update(shown, refresh=True)
        now = {name: state.status for name, state in states.items()}
        for cell in self.cells:
            is_new = now[cell.name] != self.told.get(cell.name, "waiting")
            if is_new and now[cell.name] in ("finished", "failed", "skipped") and self.told:
                line = outcome_line(cell, states[cell.name])
                self.console.print(line, style="dim", markup=False)
        self.told = now

    def __enter__(self) -> "_Display":
        if self.is_live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_live:
            self.live.stop()


def _show_results(root: Path, planned: "PlannedStudy", states: "Mapping[str, CellState]") -> None:
    """Write and print what was found by one study."""
    from keylayers.commands.console import stdout
    from keylayers.commands.study.agreement import agreement_table
    from keylayers.commands.study.table import results_table, write_table
    from keylayers.commands.study.tables import agreement_summary, summary_tables
    from keylayers.files import write_bytes

    cells, folder, axes = planned.cells, planned.folder, list(planned.study.grid)
    table = results_table(root, cells, states, axes)
    write_table(folder, table)
    shown = summary_tables(table, axes)
    written, agreement = ["results.parquet", "results.csv"], None
    if planned.study.compare:
        agreement = agreement_table(root, cells, states, axes, planned.study.compare)
        write_bytes(folder / "agreement.csv", agreement.to_csv(index=False).encode("utf-8"))
        written.append("agreement.csv")
        shown += [agreement_summary(agreement, axes)] if len(agreement) else []
    if all(find_spec(name) is not None for name in NEEDED):
        from keylayers.commands.study.report import render_study

        write_bytes(folder / "report.html", render_study(table, axes, cells, states, agreement))
        written.append("report.html")
    console = stdout()
    for one in shown:
        console.print(one)
        console.print()
    num_finished = sum(states[cell.name].status == "finished" for cell in cells)
    console.print(f"{num_finished} of {len(cells)} cells finished")
    console.print(f"{', '.join(written)} written to {folder}", markup=False)
