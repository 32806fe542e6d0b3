# SPDX-License-Identifier: Apache-2.0
"""Rows of the common preference formats: a prompt with a better and a worse answer, or a rated one.

Recognised by their columns, and turned into messages as the other formats are, so that one chat
template renders all data alike.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from keylayers.data.formats import (
    Message,
    Row,
    read_messages,
    read_question,
    read_system,
    read_text,
)
from keylayers.errors import DataError

PreferenceFormat: TypeAlias = Literal["pairs", "rated"]

_ASKED = ("prompt", "conversations", "messages", "instruction", "question", "query")
_RATED = ("label", "kto_tag")  # LLaMA-Factory's name is the second
_ANSWERED = ("completion", "response", "output")
_NEEDED = {
    "pairs": (
        "chosen+rejected, with prompt (or conversations, messages, instruction, question, query) "
        "or as whole conversations"
    ),
    "rated": (
        "label (or kto_tag), with messages, conversations, or prompt (or instruction, question, "
        "query) and completion (or response, output)"
    ),
}
_OTHER: dict[PreferenceFormat, str] = {
    "pairs": "pairs: choose `--objective` dpo, orpo or reward",
    "rated": "rated answers: choose `--objective` kto",
}


@dataclass(frozen=True)
class Preference:
    """A prompt, and a chosen and a rejected answer to it, or one answer and its label."""

    prompt: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], ...]
    is_good: bool | None = None
    """Of the one answer; nothing for a pair."""

    def digest(self) -> bytes:
        """The SHA-256 of the canonical form; equal exactly for equal preferences."""
        turns = [[[one.role, one.content] for one in part] for part in (self.prompt, *self.answers)]
        return hashlib.sha256(json.dumps([turns, self.is_good]).encode("ascii")).digest()

    def row(self) -> dict[str, object]:
        """The columns that TRL's trainers take."""

        def turns(messages: tuple[Message, ...]) -> list[dict[str, str]]:
            return [{"role": one.role, "content": one.content} for one in messages]

        names = ("chosen", "rejected") if self.is_good is None else ("completion",)
        columns: dict[str, object] = {"prompt": turns(self.prompt)}
        columns |= {name: turns(one) for name, one in zip(names, self.answers, strict=True)}
        return columns if self.is_good is None else columns | {"label": self.is_good}


def require_preferences(format: PreferenceFormat, objective: str, columns: Collection[str]) -> None:
    """Refuse columns that hold no preferences of this kind.

    Raises:
        DataError: says which columns the objective needs, and what these would do for.
    """
    if format in _kinds(columns):
        return
    others = "".join(f"; these are {_OTHER[kind]}" for kind in _kinds(columns))
    raise DataError(
        f"`objective` {objective} needs the columns {_NEEDED[format]}, got "
        f"{', '.join(columns) or 'none'}{others or '; rename the columns'}."
    )


def preferences(rows: Iterable[Row], format: PreferenceFormat) -> tuple[list[Preference], int]:
    """The preferences in the rows, in order, and how many rows had no prompt or no answer.

    Raises:
        DataError: a value is not text, a role is unknown, or a label is neither yes nor no; names
            the row, counted from 1.
    """
    convert = _CONVERTERS[format]
    usable, num_dropped_empty = [], 0
    for number, row in enumerate(rows, start=1):
        found = convert(row, number)
        has_answers = all(answer and answer[-1].content.strip() for answer in found.answers)
        if found.prompt and has_answers:
            usable.append(found)
        else:
            num_dropped_empty += 1
    return usable, num_dropped_empty


def _kinds(columns: Collection[str]) -> list[PreferenceFormat]:
    """Which kinds of preferences these columns hold."""
    names = set(columns)
    kinds: list[PreferenceFormat] = []
    if {"chosen", "rejected"} <= names:
        kinds.append("pairs")
    has_answer = names & set(_ANSWERED) and names & set(_ASKED)
    if names & set(_RATED) and (names & {"messages", "conversations"} or has_answer):
        kinds.append("rated")
    return kinds


def _from_pairs(row: Row, number: int) -> Preference:
    chosen, rejected = (_answer(row[name], name, number) for name in ("chosen", "rejected"))
    if any(answer[:1] and answer[0].role != "assistant" for answer in (chosen, rejected)):
        shared = 0  # whole conversations, UltraFeedback's even beside a prompt column
        for one, other in zip(chosen, rejected, strict=False):
            if one != other:
                break
            shared += 1
        return Preference(chosen[:shared], (chosen[shared:], rejected[shared:]))
    prompt = _prompt(row, number)
    if not prompt and not any(name in row for name in _ASKED):
        raise DataError(
            f"A pair must have a prompt, got `chosen` and `rejected` alone in row {number}; give a "
            "column `prompt`, or whole conversations as lists of role and content."
        )
    return Preference(prompt, (chosen, rejected))


def _from_rated(row: Row, number: int) -> Preference:
    name = next(column for column in _RATED if column in row)
    label = row[name]
    if not (isinstance(label, bool) or (isinstance(label, int) and label in (0, 1))):
        raise DataError(
            f"`{name}` must be true or false, got {label!r} in row {number}; mend the row."
        )
    answered = next((column for column in _ANSWERED if column in row), None)
    if answered is not None:
        answer = _answer(row[answered], answered, number)
        return Preference(_prompt(row, number), (answer,), bool(label))
    turns = _prompt(row, number)
    while turns and turns[-1].role != "assistant":
        turns = turns[:-1]
    return Preference(turns[:-1], (turns[-1:],), bool(label))


def _prompt(row: Row, number: int) -> tuple[Message, ...]:
    """What comes before the answers: messages, or text as the user's turn."""
    column = next((name for name in _ASKED if name in row), None)
    if column is None:
        return ()
    if isinstance(row[column], (list, dict)):
        found = read_messages(row[column], column, number)
        has_system = bool(found) and found[0].role == "system"
        return found if has_system else read_system(row, number) + found
    if not read_text(row[column], column, number).strip():
        return ()
    return (*read_system(row, number), read_question(row, column, number))


def _answer(value: object, column: str, number: int) -> tuple[Message, ...]:
    """An answer as text, as one turn, or as a list of turns."""
    if isinstance(value, dict) and not all(isinstance(one, list) for one in value.values()):
        return read_messages([value], column, number)
    if isinstance(value, (list, dict)):
        return read_messages(value, column, number)
    return (Message("assistant", read_text(value, column, number)),)


_CONVERTERS: dict[PreferenceFormat, Callable[[Row, int], Preference]] = {
    "pairs": _from_pairs,
    "rated": _from_rated,
}
