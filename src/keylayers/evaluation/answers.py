# SPDX-License-Identifier: Apache-2.0
"""Which answer a model gives, and whether it is right: math-verify, with limits on its time.

An answer counts where the model says that it is one: in a box, or after "the answer is". A number
somewhere in a text is no answer, and a text without one counts as unanswered, never as a guess.
Words are compared as words, for math-verify reads them as products of letters, in any order.
math-verify stops long computations by the process's alarm, which only the main thread has.
"""

import re
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from keylayers.errors import ConfigError, DataError

SECONDS = 5  # for reading one answer, and for comparing two
BOX = "\\boxed"
CHECKER = f"math-verify {metadata.version('math-verify')}, words 1"  # decides verdicts
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf)?|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_SAID = re.compile(r"(?i:answer is):?[\s*]*(\(?[A-Za-z][A-Za-z ]*\)?)[\s*]*(?=[.,;!\n]|$)")
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
        # math-verify reads no words outside a box
        words = _plain(_in_box(wanted))
        said = _SAID.findall(text) if words and BOX not in text else []
        if not said:
            return Verdict(None, is_right=False)
        return Verdict(said[-1].strip(), is_right=_plain(said[-1]) == words)
    if (are_equal := _same_words(_in_box(wanted), str(found[-1]))) is not None:
        return Verdict(str(found[-1]), are_equal)
    start = time.perf_counter()
    is_right = bool(verify(_parsed(wanted), found, timeout_seconds=SECONDS))
    is_late = not is_right and time.perf_counter() - start >= SECONDS
    return Verdict(str(found[-1]), is_right, is_late)


@lru_cache(maxsize=100_000)
def are_same(first: str, second: str) -> bool:
    """Whether two answers, as `Verdict` has them, are the same."""
    if first == second:
        return True
    if (are_equal := _same_words(first, second)) is not None:
        return are_equal
    one, other = _parsed(f"\\boxed{{{first}}}"), _parsed(f"\\boxed{{{second}}}")
    return bool(one and other and verify(one, other, timeout_seconds=SECONDS))


def _same_words(first: str, second: str) -> bool | None:
    """Whether two answers of words are the same, in any case; None where one is something else."""
    one, other = _plain(first), _plain(second)
    return one == other if min(len(one), len(other)) > 1 else None


def _plain(answer: str) -> str:
    """A letter or words, without LaTeX or brackets around them; empty for anything else."""
    text = _TEXT.sub(r"\1", answer).strip("$. ")
    text = text[1:-1] if text[:1] == "(" and text[-1:] == ")" else text
    is_words = re.fullmatch(r"[A-Za-z][A-Za-z ]*", text.strip())
    return " ".join(text.casefold().split()) if is_words else ""


def _in_box(text: str) -> str:
    """What stands in the last box of a wanted answer; all of it without one."""
    _, box, rest = text.rpartition(BOX + "{")
    depth = 1
    for place, character in enumerate(rest if box else ""):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return rest[:place]
    return text


@lru_cache(maxsize=100_000)
def _parsed(text: str) -> list[Any]:
    return parse(text, _WHERE, parsing_timeout=SECONDS)
