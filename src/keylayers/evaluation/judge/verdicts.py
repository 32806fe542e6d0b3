# SPDX-License-Identifier: Apache-2.0
"""What a judge's reply says: a rating or a verdict, or that it cannot be read. Needs no torch.

The judge is told to end with its rating or verdict in double brackets. It counts if it is there,
once or several times the same; a reply that holds none, several different ones, or one out of range
is not read, and never guessed at. Nor is a reply that was cut: what stands in brackets until there
may be a thought, or the form that the judge was told of.
"""

import re
from typing import Literal

from keylayers.evaluation.judge.client import Reply

Verdict = Literal["A", "B", "C"]

LOWEST, HIGHEST = 1, 10
_BRACKETS = re.compile(r"\[\[([^\[\]\n]{1,40})\]\]")
_NUMBER = re.compile(r"\d{1,2}(\.\d{1,3})?", re.ASCII)
_THINKING, _END_OF_THINKING = "<think>", "</think>"  # in which a model weighs other ratings


def read_rating(reply: Reply) -> float | None:
    """The rating from 1 to 10 that a reply gives; None if it gives none that can be read."""
    found = _in_brackets(reply)
    if len(found) != 1 or not _NUMBER.fullmatch(found[0]):
        return None
    rating = float(found[0])
    return rating if LOWEST <= rating <= HIGHEST else None


def read_verdict(reply: Reply) -> Verdict | None:
    """Which of two answers is better, A or B, or C for neither; None if it cannot be read."""
    found = _in_brackets(reply)
    if found == ["A"]:
        return "A"
    if found == ["B"]:
        return "B"
    return "C" if found == ["C"] else None


def _in_brackets(reply: Reply) -> list[str]:
    """The different things in double brackets, without what the judge thought to itself."""
    if reply.is_cut:
        return []
    said = reply.text.rpartition(_END_OF_THINKING)[2].partition(_THINKING)[0]
    return list(dict.fromkeys(match.strip() for match in _BRACKETS.findall(said)))
