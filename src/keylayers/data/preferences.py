# SPDX-License-Identifier: Apache-2.0
"""Rows of the common preference formats: a prompt with a better and a worse answer, or a rated one.

The objective says which format it needs.
"""

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from itertools import chain, takewhile
from typing import Literal, TypeAlias

from datasets import Dataset

from keylayers.data.turns import (
    Message,
    Row,
    digest,
    flag_of,
    is_silent,
    read_answer,
    read_flag,
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
    row_number: int = field(default=0, compare=False)  # in the data, from 1

    @property
    def messages(self) -> list[Message]:
        """All turns."""
        return [*self.prompt, *chain.from_iterable(self.answers)]

    @property
    def has_answer(self) -> bool:
        """Whether the prompt and the answers hold anything."""
        return bool(self.prompt) and all(
            answer and not is_silent(answer[-1]) for answer in self.answers
        )

    @property
    def is_equal(self) -> bool:
        """Whether both answers are the same, so that there is nothing to prefer."""
        return self.is_good is None and self.answers[0] == self.answers[1]

    def digest(self) -> bytes:
        """Equal exactly for equal preferences."""
        return digest([values_of(part) for part in (self.prompt, *self.answers)], self.is_good)

    def row(self) -> dict[str, object]:
        """The columns that TRL's trainers take."""
        if self.is_good is None:
            chosen, rejected = self.answers
            return {"prompt": self.prompt, "chosen": chosen, "rejected": rejected}
        return {"prompt": self.prompt, "completion": self.answers[0], "label": self.is_good}


def require_columns(objective: Objective, cells: Row) -> PreferenceFormat:
    """The format that the objective needs, if the columns hold it; `cells` are their first ones."""
    format, names = FORMAT_OF[objective], set(cells)
    is_answered = names & set(_ANSWERED) and names & set(_ASKED)
    fits: dict[PreferenceFormat, object] = {
        "pairs": {"chosen", "rejected"} <= names,
        "rated": names & set(_RATED) and (names & {"messages", "conversations"} or is_answered),
    }
    if not fits[format]:
        others = "".join(f"; these are {_NEEDED[other][1]}" for other in fits if fits[other])
        raise DataError(
            f"`objective` {objective} needs the columns {_NEEDED[format][0]}, got "
            f"{', '.join(cells)}{others or '; rename the columns'}."
        )
    is_answer = not isinstance(cells.get("chosen"), list)  # no whole conversation
    if format == "pairs" and is_answer and not names & set(_ASKED):
        raise DataError(
            "A pair must have a prompt, got only `chosen` and `rejected`; add a column `prompt`, "
            "or give whole conversations as lists of role and content."
        )
    return format


def _from_pairs(row: Row) -> Iterator[Preference]:
    pair = [_read_side(row, name) for name in ("chosen", "rejected")]
    chosen, rejected = pair
    if all(turns[:1] and turns[0]["role"] != "assistant" for turns in pair):
        # Whole conversations; UltraFeedback has them in addition to a column `prompt`. Both keep at
        # least their last turn, so that equal ones are a prompt and equal answers.
        both = zip(chosen[:-1], rejected[:-1], strict=False)
        shared = len(list(takewhile(lambda turns: turns[0] == turns[1], both)))
        prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    else:
        prompt = _prompt(row)
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns and turns[0]["role"] != "assistant":
            raise DataError(
                f"`{name}` must begin with a turn of the assistant after what it shares with the "
                f"other answer, got a turn of role {turns[0]['role']!r}; fix the row."
            )
    yield Preference(prompt, (chosen, rejected))


def _read_side(row: Row, name: str) -> list[Message]:
    """An answer, or a conversation up to the last one."""
    turns = _unmarked(read_answer(row, name))
    answered = until_answer(turns)
    if turns and not answered:
        raise DataError(
            f"`{name}` must hold an answer of the assistant, got a turn of role "
            f"{turns[-1]['role']!r}; fix its role."
        )
    return answered


def _from_rated(row: Row) -> Iterator[Preference]:
    rated = next((column for column in _RATED if column in row), None)
    if rated is None:
        raise DataError(f"`{_RATED[0]}` must be true or false, got null; fix the row.")
    rating = read_flag(row[rated], rated)
    answered = next((column for column in _ANSWERED if column in row), None)
    if answered is not None:
        answer = _read_side(row, answered)
        yield Preference(_prompt(row), (answer,), rating)
    else:
        turns = until_answer(_prompt(row))
        yield Preference(turns[:-1], (turns[-1:],), rating)


def rated_column(data: Dataset) -> str | None:
    """The column that says which answers are good ones; a `label` of a classifier does not."""
    for name in _RATED:
        cells = data[name] if name in data.column_names else ()
        given = {cell if isinstance(cell, Hashable) else "a list" for cell in cells}
        given -= {None, ""}
        if given and all(flag_of(value) is not None for value in given):
            return name
    return None


def _unmarked(turns: list[Message]) -> list[Message]:
    """Without marks of what is learned: preferences are about whole answers."""
    return [{name: turn[name] for name in turn if name != "weight"} for turn in turns]


def _prompt(row: Row) -> list[Message]:
    """The turns before the answers; none for an empty text."""
    column = next((name for name in _ASKED if name in row), None)
    if column is None:
        return []
    is_text = not isinstance(row[column], (list, dict))
    if is_text and not read_text(row[column], column).strip():
        return []
    return with_system(row, _unmarked(read_prompt(row, column)))


PREFERENCES: dict[PreferenceFormat, Callable[[Row], Iterator[Preference]]] = {
    "pairs": _from_pairs,
    "rated": _from_rated,
}
