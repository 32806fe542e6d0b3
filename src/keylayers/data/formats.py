# SPDX-License-Identifier: Apache-2.0
"""Rows of the common formats of supervised fine-tuning, turned into conversations.

The columns show the format. Every format but plain text becomes turns of system, user and
assistant, so the rest of keylayers handles a single form.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import ClassVar

from keylayers.data.options import DataFormat
from keylayers.data.turns import (
    Message,
    Row,
    answer,
    digest,
    in_turn,
    is_learned,
    is_silent,
    read_answer,
    read_messages,
    read_prompt,
    read_text,
    read_tools,
    values_of,
    with_system,
    wrong_shape,
)
from keylayers.errors import DataError

# Question and answer columns in use. `solution` comes before `answer` because LIMO keeps the worked
# solution, which is what is trained, in the first and the bare result in the second. s1K-1.1 keeps
# bare results in `solution`; its reasoning and the answer after it are trained as one text.
PAIRS: tuple[tuple[str, ...], ...] = (
    ("question", "deepseek_thinking_trajectory", "deepseek_attempt"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "solution"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("problem", "solution"),
    ("problem", "answer"),
    ("instruction", "response"),
)


@dataclass(frozen=True)
class Conversation:
    """Turns up to the last answer to learn, or a plain `text` that has no roles."""

    messages: list[Message]
    text: str | None = None
    tools: list[object] | None = None  # descriptions for the template
    num_empty: int = field(default=0, compare=False)  # answers that say nothing
    num_masked: int = field(default=0, compare=False)  # others that are not to be learned
    row_number: int = field(default=0, compare=False)  # in the data, from 1

    is_equal: ClassVar[bool] = False  # pairs of answers can be

    @property
    def has_answer(self) -> bool:
        """Whether there is anything to learn."""
        return bool(self.messages or (self.text or "").strip())

    def digest(self) -> bytes:
        """Equal exactly for equal conversations."""
        more = [self.tools] if self.tools else []
        return digest(values_of(self.messages), self.text, *more)


def read_format(first_row: Row, asked: DataFormat | None) -> DataFormat:
    """The format that the user forces, or that the columns of the data show."""
    found = ", ".join(first_row)
    if asked is not None:
        alternatives, _ = FORMATS[asked]
        missing = [[name for name in names if name not in first_row] for names in alternatives]
        fewest = min(missing, key=len)
        if fewest:
            raise DataError(
                f"The format {asked!r} needs the columns {_describe(asked)}; {', '.join(fewest)} "
                f"missing from {found}. Rename the columns, or leave out `--format`."
            )
        return asked
    if {"chosen", "rejected"} <= first_row.keys():
        raise preference_data(found)
    for format in FORMATS:
        if _fits(first_row, format):
            return format
    known = "; ".join(f"{format} ({_describe(format)})" for format in FORMATS)
    raise DataError(
        f"The columns must fit a known format, got {found}; known are {known}. Rename the "
        "columns, or force a format with `--format`."
    )


def preference_data(columns: str) -> DataError:
    """The error about data that look like plain answers, though half of them are to be avoided."""
    return DataError(
        f"Supervised fine-tuning needs answers to imitate, got preference data (columns "
        f"{columns}); choose an objective for preferences with `--objective`, keep the good "
        "answers only, or force a format with `--format`."
    )


def _describe(format: DataFormat) -> str:
    return " or ".join("+".join(names) for names in FORMATS[format][0])


def conversations_of(row: Row, format: DataFormat, *, is_forced: bool) -> Iterator[Conversation]:
    """The conversations of a row, in the format of the data if its columns fit.

    Data sets that are joined have the columns of all; a row has those that are not empty in it.
    """
    if is_forced:
        return FORMATS[format][1](row)
    fitting = [name for name in (format, *FORMATS) if _fits(row, name)]
    found = fitting[0] if fitting else format
    if (found == "text") != (format == "text"):
        if not any(name in row for name in chain.from_iterable(FORMATS[format][0])):
            raise DataError(
                f"Conversations and plain text must be in separate data sets, got a row in the "
                f"format {found!r} among those in the format {format!r}; split the data."
            )
        found = format  # its answer is missing
    return FORMATS[found][1](row)


def _fits(row: Row, format: DataFormat) -> bool:
    if format in ("sharegpt", "lima") and "conversations" in row:
        turns = row["conversations"]
        is_text = isinstance(turns, list) and bool(turns) and isinstance(turns[0], str)
        return is_text is (format == "lima")
    return any(row.keys() >= set(names) for names in FORMATS[format][0])


def _conversation(row: Row, turns: list[Message]) -> Conversation:
    """The turns up to the last answer that is learned, with the row's system text and tools."""
    turns = with_system(row, turns)
    not_learned = [turn for turn in turns if turn["role"] == "assistant" and not is_learned(turn)]
    num_empty = sum(map(is_silent, not_learned))
    while turns and not is_learned(turns[-1]):
        turns = turns[:-1]
    num_masked, tools = len(not_learned) - num_empty, read_tools(row.get("tools"))
    return Conversation(turns, tools=tools, num_empty=num_empty, num_masked=num_masked)


def _from_messages(row: Row) -> Iterator[Conversation]:
    column = "messages" if "messages" in row else "conversations"
    yield _conversation(row, read_messages(row.get(column), column))


def _from_lima(row: Row) -> Iterator[Conversation]:
    texts = row.get("conversations") or []
    if not isinstance(texts, list):
        raise wrong_shape("`conversations` must be a list of texts", texts)
    yield _conversation(row, in_turn(texts, "conversations"))


def _from_alpaca(row: Row) -> Iterator[Conversation]:
    history = row.get("history") or []  # LLaMA-Factory: earlier questions and answers
    if not isinstance(history, list) or any(
        not isinstance(each, list) or len(each) != 2 for each in history
    ):
        raise wrong_shape("`history` must be a list of [question, answer]", history)
    earlier = in_turn(chain.from_iterable(history), "history")
    asked = earlier + read_prompt(row, "instruction")
    yield _conversation(row, [*asked, answer(row.get("output"), "output")])


def _from_self_instruct(row: Row) -> Iterator[Conversation]:
    instances = row.get("instances") or []
    if not (isinstance(instances, list) and all(isinstance(each, dict) for each in instances)):
        raise wrong_shape("`instances` must be a list of input and output", instances)
    for instance in instances:
        asked = read_prompt({**instance, "instruction": row.get("instruction")}, "instruction")
        yield _conversation(row, [*asked, answer(instance.get("output"), "output")])


def _from_pair(row: Row) -> Iterator[Conversation]:
    whole = [names for names in PAIRS if row.keys() >= set(names)]
    answers = [names for names in PAIRS if row.keys() >= set(names[1:])]  # to an empty question
    asked, *answered = [*whole, *answers, *PAIRS][0]
    yield _conversation(row, read_prompt(row, asked) + read_answer(row, *answered))


def _from_text(row: Row) -> Iterator[Conversation]:
    yield Conversation([], read_text(row.get("text"), "text"))


# Each format's columns, as alternatives, and its converter. The first match wins: UltraChat and No
# Robots have `prompt` as well as `messages`, and Alpaca has the joined `text` next to its own.
FORMATS: dict[
    DataFormat, tuple[tuple[tuple[str, ...], ...], Callable[[Row], Iterator[Conversation]]]
] = {
    "messages": ((("messages",),), _from_messages),
    "sharegpt": ((("conversations",),), _from_messages),
    "lima": ((("conversations",),), _from_lima),
    "self-instruct": ((("instruction", "instances"),), _from_self_instruct),
    "alpaca": ((("instruction", "output"),), _from_alpaca),
    "prompt-completion": (PAIRS, _from_pair),
    "text": ((("text",),), _from_text),
}
