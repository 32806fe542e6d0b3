# SPDX-License-Identifier: Apache-2.0
"""What the sub-commands show: results on stdout, progress and notes on stderr."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from keylayers.progress import OnStep

PIPE_WIDTH = 120


class ConsoleProgress:
    """Progress bars with loss and time left in a terminal; elsewhere a line after each stage."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, num_steps: int | None) -> Iterator[OnStep]:
        """A bar for one part of the run."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        last = 0
        start = time.perf_counter()
        is_hidden = not self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=is_hidden) as bars:
            bar = bars.add_task(title, total=num_steps, loss="-")

            def on_step(step: int, loss: float) -> None:
                nonlocal last
                last = step
                bars.update(bar, completed=step, loss=f"{loss:.3f}")

            yield on_step
        seconds = time.perf_counter() - start
        self.note(f"{title}: {last} steps, {seconds:.0f} s")

    def note(self, text: str) -> None:
        """One line on stderr."""
        self.console.print(text, style="dim", markup=False)


def stdout() -> Console:
    """Where results go; in a file or a pipe without colours, and wide enough for long names."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    return console
