# SPDX-License-Identifier: Apache-2.0
"""Rows of the common preference formats: a prompt with a better and a worse answer, or a rated one.

The objective says which format it needs.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, TypeAlias

from keylayers.data.turns import (
    Message,
    Row,
    digest,
    read_answer,
    read_prompt,
    read_text,
    until_answer,
    values_of,
    with_system,
)
from keylayers.errors import DataError
from keylayers.model.options import Objective

PreferenceFormat: TypeAlias = Literal["pairs", "rated"]
FORMAT_OF: dict[Objective, PreferenceFormat] = {
    **dict.fromkeys(("dpo", "orpo", "reward"), "pairs"),
    "kto": "rated",
}

_ASKED = ("prompt", "conversations", "messages", "instruction", "question", "query")
_RATED = ("label", "kto_tag")  # LLaMA-Factory uses the second
_ANSWERED = ("completion", "response", "output")
# What each format needs, and which objectives to choose for data that have it.
_NEEDED: dict[PreferenceFormat, tuple[str, str]] = {
    "pairs": (
        "chosen+rejected, with prompt (or conversations, messages, instruction, question, query) "
        "or as whole conversations",
        "pairs: choose `--objective` dpo, orpo or reward",
    ),
    "rated": (
        "label (or kto_tag), with messages, conversations, or prompt (or instruction, question, "
        "query) and completion (or response, output)",
        "rated answers: choose `--objective` kto",
    ),
}


@dataclass(frozen=True)
class Preference:
    """A prompt with a chosen and a rejected answer, or with one answer and its rating."""

    prompt: list[Message]
    answers: tuple[list[Message], ...]
    is_good: bool | None = None  # None for a pair

    @property
    def has_answer(self) -> bool:
        """Whether the prompt and the answers hold anything."""
        return bool(self.prompt) and all(
            answer and answer[-1]["content"].strip() for answer in self.answers
        )

    def digest(self) -> bytes:
        """Equal exactly for equal preferences."""
        return digest([values_of(part) for part in (self.prompt, *self.answers)], self.is_good)

    def row(self) -> dict[str, object]:
        """The columns that TRL's trainers take."""
        if self.is_good is None:
            chosen, rejected = self.answers
            return {"prompt": self.prompt, "chosen": chosen, "rejected": rejected}
        return {"prompt": self.prompt, "completion": self.answers[0], "label": self.is_good}


def require_columns(objective: Objective, columns: Iterable[str]) -> PreferenceFormat:
    """The format that the objective needs, if the columns hold it."""
    format, names = FORMAT_OF[objective], set(columns)
    is_answered = names & set(_ANSWERED) and names & set(_ASKED)
    fits: dict[PreferenceFormat, object] = {
        "pairs": {"chosen", "rejected"} <= names,
        "rated": names & set(_RATED) and (names & {"messages", "conversations"} or is_answered),
    }
    if not fits[format]:
        others = "".join(f"; these are {_NEEDED[other][1]}" for other in fits if fits[other])
        raise DataError(
            f"`objective` {objective} needs the columns {_NEEDED[format][0]}, got "
            f"{', '.join(columns)}{others or '; rename the columns'}."
        )
    return format


def _from_pairs(row: Row) -> Iterator[Preference]:
    chosen, rejected = read_answer(row, "chosen"), read_answer(row, "rejected")
    if any(turns[:1] and turns[0]["role"] != "assistant" for turns in (chosen, rejected)):
        # Whole conversations; UltraFeedback has them in addition to a column `prompt`.
        both = zip(chosen, rejected, strict=False)
        shared = len(list(takewhile(lambda turns: turns[0] == turns[1], both)))
        yield Preference(chosen[:shared], (chosen[shared:], rejected[shared:]))
        return
    prompt = _prompt(row)
    if not prompt and not any(name in row for name in _ASKED):
        raise DataError(
            "A pair must have a prompt, got only `chosen` and `rejected`; add a column `prompt`, "
            "or give whole conversations as lists of role and content."
        )
    yield Preference(prompt, (chosen, rejected))


def _from_rated(row: Row) -> Iterator[Preference]:
    rating = read_rating(row)
    answered = next((column for column in _ANSWERED if column in row), None)
    if answered is not None:
        yield Preference(_prompt(row), (read_answer(row, answered),), rating)
    else:
        turns = until_answer(_prompt(row))
        yield Preference(turns[:-1], (turns[-1:],), rating)


def read_rating(row: Row) -> bool:
    """Whether the answer is a good one."""
    name = next(column for column in _RATED if column in row)
    label = row[name]
    if not (isinstance(label, int) and label in (0, 1)):  # a bool is an int too
        raise DataError(f"`{name}` must be true or false, got {label!r:.60}; fix the row.")
    return bool(label)


def _prompt(row: Row) -> list[Message]:
    """The turns before the answers; none for an empty text."""
    column = next((name for name in _ASKED if name in row), None)
    if column is None:
        return []
    is_text = not isinstance(row[column], (list, dict))
    if is_text and not read_text(row[column], column).strip():
        return []
    return with_system(row, read_prompt(row, column))


PREFERENCES: dict[PreferenceFormat, Callable[[Row], Iterator[Preference]]] = {
    "pairs": _from_pairs,
    "rated": _from_rated,
}
