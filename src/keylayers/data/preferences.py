# SPDX-License-Identifier: Apache-2.0
"""Rows of the common preference formats: a prompt with a better and a worse answer, or a rated one.

A format is recognised by its columns, and its rows become messages. TRL's trainers render and
tokenise them; here we only measure lengths, to leave out and count the examples that a trainer
would drop or cut until no answer is left.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

from keylayers.data.chat import ChatTemplate, render
from keylayers.data.formats import (
    Message,
    Row,
    read_messages,
    read_question,
    read_system,
    read_text,
    until_answer,
)
from keylayers.errors import DataError
from keylayers.model.options import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PreferenceFormat: TypeAlias = Literal["pairs", "rated"]
FORMAT_OF: dict[Objective, PreferenceFormat] = {
    "dpo": "pairs",
    "kto": "rated",
    "orpo": "pairs",
    "reward": "pairs",
}
ADDED_TOKENS = 2  # ORPO's trainer (TRL 1.16) adds a start and an end token where they are missing

_ASKED = ("prompt", "conversations", "messages", "instruction", "question", "query")
_RATED = ("label", "kto_tag")  # LLaMA-Factory uses the second
_ANSWERED = ("completion", "response", "output")
_PAIR = ("prompt", "chosen", "rejected")
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
    """A prompt with a chosen and a rejected answer, or with one answer and its label."""

    prompt: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], ...]
    is_good: bool | None = None
    """The label of the single answer; None for a pair."""

    def digest(self) -> bytes:
        """The SHA-256 of the canonical form; equal exactly for equal preferences."""
        parts = (self.prompt, *self.answers)
        turns = [[[message.role, message.content] for message in part] for part in parts]
        return hashlib.sha256(json.dumps([turns, self.is_good]).encode("ascii")).digest()


@dataclass(frozen=True)
class MeasuredPreference:
    """A preference and the lengths of its parts, before and after the cut to `max_length`."""

    preference: Preference
    objective: Objective
    max_length: int
    num_prompt_tokens: int
    num_whole_tokens: tuple[int, ...]
    """Tokens of the prompt with each answer, before the cut."""
    is_last_answer_only: bool = False
    """Never: the loss counts the answers alone."""

    @property
    def num_cut_tokens(self) -> tuple[int, ...]:
        """Tokens of the prompt with each answer, after the cut."""
        return tuple(min(whole, self.max_length) for whole in self.num_whole_tokens)

    @property
    def is_truncated(self) -> bool:
        """Whether the end of an answer is cut off."""
        return self.num_cut_tokens != self.num_whole_tokens

    @property
    def num_used_tokens(self) -> int:
        """Tokens after the cut; a pair has two sequences."""
        return sum(self.num_cut_tokens)

    @property
    def num_label_tokens(self) -> int:
        """Tokens of the answers after the cut."""
        return sum(max(0, cut - self.num_prompt_tokens) for cut in self.num_cut_tokens)

    @property
    def is_usable(self) -> bool:
        """Whether the trainer would use it; a reward model must see both answers whole."""
        if self.objective == "reward":
            return not self.is_truncated
        return self.num_prompt_tokens + ADDED_TOKENS <= self.max_length

    def row(self) -> dict[str, object]:
        """The columns that TRL's trainers take."""
        found = self.preference
        names = ("prompt", "completion") if len(found.answers) == 1 else _PAIR
        columns: dict[str, object] = {
            name: [{"role": message.role, "content": message.content} for message in part]
            for name, part in zip(names, (found.prompt, *found.answers), strict=True)
        }
        return columns if found.is_good is None else columns | {"label": found.is_good}


def measure(
    preference: Preference,
    objective: Objective,
    tokenizer: "PreTrainedTokenizerBase",
    template: ChatTemplate,
    max_length: int,
) -> MeasuredPreference:
    """The preference with its lengths in tokens.

    Raises:
        DataError: the template fails on it.
    """

    def length(messages: Sequence[Message], *, prompt: bool = False) -> int:
        text, _ = render(messages, tokenizer, template, prompt=prompt)
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    prompt = preference.prompt
    whole = tuple(length([*prompt, *answer]) for answer in preference.answers)
    num_prompt_tokens = length(prompt, prompt=True)
    return MeasuredPreference(preference, objective, max_length, num_prompt_tokens, whole)


def require_preferences(format: PreferenceFormat, objective: str, columns: Collection[str]) -> None:
    """Refuse columns that do not hold preferences in this format.

    Raises:
        DataError: says which columns the objective needs, and which objective these columns fit.
    """
    names = set(columns)
    is_answered = names & set(_ANSWERED) and names & set(_ASKED)
    fits: dict[PreferenceFormat, object] = {
        "pairs": {"chosen", "rejected"} <= names,
        "rated": names & set(_RATED) and (names & {"messages", "conversations"} or is_answered),
    }
    if not fits[format]:
        others = "".join(f"; these are {_NEEDED[other][1]}" for other in fits if fits[other])
        raise DataError(
            f"`objective` {objective} needs the columns {_NEEDED[format][0]}, got "
            f"{', '.join(columns) or 'none'}{others or '; rename the columns'}."
        )


def preferences(rows: Iterable[Row], format: PreferenceFormat) -> tuple[list[Preference], int]:
    """The preferences in the rows, in order, and how many rows had no prompt or no answer.

    Raises:
        DataError: a value is not text, a role is unknown, or a label is neither true nor false;
            names the row, counted from 1.
    """
    convert = _from_pairs if format == "pairs" else _from_rated
    usable, num_dropped_empty = [], 0
    for number, row in enumerate(rows, start=1):
        found = convert(row, number)
        has_answers = all(answer and answer[-1].content.strip() for answer in found.answers)
        if found.prompt and has_answers:
            usable.append(found)
        else:
            num_dropped_empty += 1
    return usable, num_dropped_empty


def _from_pairs(row: Row, number: int) -> Preference:
    chosen, rejected = (_answer(row[name], name, number) for name in ("chosen", "rejected"))
    if any(answer[:1] and answer[0].role != "assistant" for answer in (chosen, rejected)):
        shared = 0  # whole conversations; UltraFeedback has them in addition to a prompt column
        for left, right in zip(chosen, rejected, strict=False):
            if left != right:
                break
            shared += 1
        return Preference(chosen[:shared], (chosen[shared:], rejected[shared:]))
    prompt = _prompt(row, number)
    if not prompt and not any(name in row for name in _ASKED):
        raise DataError(
            f"A pair must have a prompt, got only `chosen` and `rejected` in row {number}; add a "
            "column `prompt`, or give whole conversations as lists of role and content."
        )
    return Preference(prompt, (chosen, rejected))


def _from_rated(row: Row, number: int) -> Preference:
    name = next(column for column in _RATED if column in row)
    label = row[name]
    if not (isinstance(label, int) and label in (0, 1)):  # a bool is an int too
        raise DataError(
            f"`{name}` must be true or false, got {label!r} in row {number}; fix the row."
        )
    answered = next((column for column in _ANSWERED if column in row), None)
    if answered is not None:
        answer = _answer(row[answered], answered, number)
        return Preference(_prompt(row, number), (answer,), bool(label))
    turns = until_answer(_prompt(row, number))
    return Preference(turns[:-1], (turns[-1:],), bool(label))


def _prompt(row: Row, number: int) -> tuple[Message, ...]:
    """The turns before the answers: messages, or text as the user's turn."""
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
    if isinstance(value, dict) and not all(isinstance(part, list) for part in value.values()):
        return read_messages([value], column, number)
    if isinstance(value, (list, dict)):
        return read_messages(value, column, number)
    return (Message("assistant", read_text(value, column, number)),)
