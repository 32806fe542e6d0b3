# SPDX-License-Identifier: Apache-2.0
"""How a run tells a person what it is doing; the command line draws it, a library stays silent."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

OnStep = Callable[[int, float | None], None]


@runtime_checkable
class Progress(Protocol):
    """Where a run reports to."""

    def stage(self, title: str, num_steps: int | None) -> AbstractContextManager[OnStep]:
        """A part of the run; gives a function to call after each step, with number and any loss."""
        ...

    def note(self, text: str) -> None:
        """One line that a person should read."""
        ...


class Silent:
    """Reports nothing."""

    def stage(self, title: str, num_steps: int | None) -> AbstractContextManager[OnStep]:
        """A part of the run that is not shown."""

        def ignore(step: int, loss: float | None) -> None:
            return None

        return nullcontext(ignore)

    def note(self, text: str) -> None:
        """Not shown either."""
