# SPDX-License-Identifier: Apache-2.0
"""What the sub-commands show: results on stdout, progress and notes on stderr."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich import progress
from rich.console import Console, RenderableType

from keylayers.environment import is_first_process
from keylayers.progress import OnStep, Progress

PIPE_WIDTH = 120
LINE_SECONDS = 30.0  # between lines about a stage, where there is no terminal


class ConsoleProgress(Progress):
    """Progress bars with loss and time left in a terminal; elsewhere lines, now and then."""

    def __init__(self) -> None:
        is_quiet = not is_first_process()
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=is_quiet)

    @contextmanager
    def stage(self, title: str, num_steps: int | None) -> Iterator[OnStep]:
        """A bar for one part of the run."""
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[loss]}"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
        )
        told_at = time.perf_counter()
        is_hidden = not self.console.file.isatty()
        shown = progress.Progress(*columns, console=self.console, transient=True, disable=is_hidden)
        with shown as bars:
            bar = bars.add_task(title, total=num_steps, loss="")

            def on_step(step: int, loss: float | None) -> None:
                nonlocal told_at
                of_loss = "" if loss is None else f"loss {loss:.3f}"
                bars.update(bar, completed=step, loss=of_loss)
                if is_hidden and time.perf_counter() - told_at > LINE_SECONDS:
                    told_at = time.perf_counter()
                    of = "" if num_steps is None else f" of {num_steps}"
                    self.note(", ".join(filter(None, (f"{title}: step {step}{of}", of_loss))))

            yield on_step
        (done,) = shown.tasks
        self.note(f"{title}: {done.completed:.0f} steps, {done.elapsed or 0:.0f} s")

    def note(self, text: str) -> None:
        """One line on stderr."""
        self.console.print(text, style="dim", markup=False)


def print_json(content: Any) -> None:
    """Print JSON for machines on stdout."""
    json.dump(content, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def print_result(report: RenderableType, where: str) -> None:
    """Print what a run found, and where its files are."""
    console = stdout()
    console.print(report)
    console.print(f"\n{where}", markup=False)


def stdout() -> Console:
    """Where results go; in a file or a pipe wide enough for long names.

    Jupyter's kernels set FORCE_COLOR, so that rich takes a pipe for a terminal.
    """
    console = Console(highlight=False, quiet=not is_first_process())
    if not console.file.isatty():
        console.width = PIPE_WIDTH
    return console
