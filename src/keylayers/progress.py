# SPDX-License-Identifier: Apache-2.0
"""How a run reports what it is doing: the command line shows it, the library stays silent."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

OnStep = Callable[[int, float | None], None]


class Progress:
    """Receives the reports of a run, and does nothing with them."""

    def stage(self, title: str, num_steps: int | None) -> AbstractContextManager[OnStep]:
        """A part of the run; yields a function to call after each step with its number and loss."""
        return nullcontext(lambda step, loss: None)

    def note(self, text: str) -> None:
        """Report a line that the user should read."""
        return


@contextmanager
def quiet(*libraries: str) -> Iterator[None]:
    """Keep the loggers of libraries from printing: exceptions say what went wrong."""
    before = [(logger, logger.level) for logger in map(logging.getLogger, libraries)]
    for logger, _ in before:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in before:
            logger.setLevel(level)
