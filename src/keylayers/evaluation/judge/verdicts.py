# SPDX-License-Identifier: Apache-2.0
"""What a judge's reply says: a rating or a verdict, or that it cannot be read. Needs no torch.

The judge is told to end with its rating or verdict in double brackets. It counts if it is there,
once or several times the same; a reply that holds none, several different ones, or one out of range
is not read, and never guessed at.
"""

import re
from typing import Literal

Verdict = Literal["A", "B", "C"]

LOWEST, HIGHEST = 1, 10
_BRACKETS = re.compile(r"\[\[([^\[\]\n]{1,40})\]\]")
_NUMBER = re.compile(r"\d{1,2}(\.\d{1,3})?", re.ASCII)
_END_OF_THINKING = "</think>"  # models that reason may think of other ratings before


def read_rating(reply: str) -> float | None:
    """The rating from 1 to 10 that a reply gives; None if it gives none that can be read."""
    found = _in_brackets(reply)
    if len(found) != 1 or not _NUMBER.fullmatch(found[0]):
        return None
    rating = float(found[0])
    return rating if LOWEST <= rating <= HIGHEST else None


def read_verdict(reply: str) -> Verdict | None:
    """Which of two answers is better, A or B, or C for neither; None if it cannot be read."""
    found = _in_brackets(reply)
    if found == ["A"]:
        return "A"
    if found == ["B"]:
        return "B"
    return "C" if found == ["C"] else None


def _in_brackets(reply: str) -> list[str]:
    """The different things in double brackets, after what the judge thought to itself."""
    said = reply.rpartition(_END_OF_THINKING)[2]
    return list(dict.fromkeys(match.strip() for match in _BRACKETS.findall(said)))
