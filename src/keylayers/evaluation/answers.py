# SPDX-License-Identifier: Apache-2.0
"""Which answer a model gives, and whether it is right: math-verify, with limits on its time.

An answer counts where the model says that it is one: in a box, or after "the answer is". A number
somewhere in a text is no answer, and a text without one counts as unanswered, never as a guess.
math-verify stops long computations by the process's alarm, which only the main thread has.
"""

import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from keylayers.errors import ConfigError, DataError

SECONDS = 5  # for reading one answer, and for comparing two
BOX = "\\boxed"
_WHERE = (
    LatexExtractionConfig(try_extract_without_anchor=False, boxed_match_priority=0),
    ExprExtractionConfig(try_extract_without_anchor=False),
)


@dataclass(frozen=True)
class Verdict:
    """What a text answers.

    Attributes:
        answer: As the model wrote it; None if the text gives none.
        is_right: Whether it equals the wanted one.
        is_out_of_time: The comparison was stopped; it counts as not right.
    """

    answer: str | None
    is_right: bool
    is_out_of_time: bool = False


def check_thread() -> None:
    """Raise a ConfigError outside the process's main thread, where no time limit works."""
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(
            "problems must be checked in the main thread of the process, which alone can stop a "
            "checker that takes too long; call `evaluate` from there"
        )


def check_answer(text: str) -> None:
    """Raise a DataError for a wanted answer that cannot be read."""
    if not _parsed(text):
        raise DataError(f"every answer must be one that math-verify reads, got {text[:80]!r}")


def verdict(text: str, wanted: str) -> Verdict:
    """Whether a model's text answers as wanted.

    Args:
        text: What the model wrote.
        wanted: A text that holds the right answer in the same way.
    """
    # Whoever boxes twice has changed their mind; the checker would take both for the answer.
    last = text[text.rfind(BOX) :] if BOX in text else text
    found = parse(last, _WHERE, parsing_timeout=SECONDS)
    if not found:
        return Verdict(None, is_right=False)
    start = time.perf_counter()
    is_right = bool(verify(_parsed(wanted), found, timeout_seconds=SECONDS))
    is_late = not is_right and time.perf_counter() - start >= SECONDS
    return Verdict(str(found[-1]), is_right, is_late)


@lru_cache(maxsize=100_000)
def are_same(first: str, second: str) -> bool:
    """Whether two answers, as `Verdict` has them, are the same."""
    if first == second:
        return True
    one, other = _parsed(f"\\boxed{{{first}}}"), _parsed(f"\\boxed{{{second}}}")
    return bool(one and other and verify(one, other, timeout_seconds=SECONDS))


@lru_cache(maxsize=100_000)
def _parsed(text: str) -> list[Any]:
    return parse(text, _WHERE, parsing_timeout=SECONDS)
