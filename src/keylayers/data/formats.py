# SPDX-License-Identifier: Apache-2.0
"""Rows of the common formats of supervised fine-tuning, turned into conversations.

The columns show the format. Every format but plain text becomes turns of system, user and
assistant, so the rest of keylayers handles a single form.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

from keylayers.data.options import DataFormat
from keylayers.data.turns import (
    Message,
    Row,
    answer,
    digest,
    in_turn,
    read_answer,
    read_messages,
    read_prompt,
    read_text,
    until_answer,
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
    """Turns up to the last answer, or a plain `text` that has no roles."""

    messages: list[Message]
    text: str | None = None

    @property
    def has_answer(self) -> bool:
        """Whether there is anything to learn."""
        last = self.text or "".join(message["content"] for message in self.messages[-1:])
        return bool(last.strip())

    def digest(self) -> bytes:
        """Equal exactly for equal conversations."""
        return digest(values_of(self.messages), self.text)


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
    if {"chosen", "rejected"} <= first_row.keys() or isinstance(first_row.get("label"), bool):
        # It looks like plain answers, but half of them are answers to avoid.
        raise DataError(
            f"Supervised fine-tuning needs answers to imitate, got preference data (columns "
            f"{found}); choose an objective for preferences with `--objective`, keep the good "
            "answers only, or force a format with `--format`."
        )
    for format, (alternatives, _) in FORMATS.items():
        if any(first_row.keys() >= set(names) for names in alternatives):
            turns = first_row["conversations"] if format == "sharegpt" else None
            is_lima = isinstance(turns, list) and bool(turns) and isinstance(turns[0], str)
            return "lima" if is_lima else format
    known = "; ".join(f"{format} ({_describe(format)})" for format in FORMATS)
    raise DataError(
        f"The columns must fit a known format, got {found}; known are {known}. Rename the "
        "columns, or force a format with `--format`."
    )


def _describe(format: DataFormat) -> str:
    return " or ".join("+".join(names) for names in FORMATS[format][0])


def _from_messages(row: Row) -> Iterator[Conversation]:
    column = "messages" if "messages" in row else "conversations"
    yield Conversation(until_answer(with_system(row, read_messages(row[column], column))))


def _from_lima(row: Row) -> Iterator[Conversation]:
    texts = row["conversations"] or []
    if not isinstance(texts, list):
        raise wrong_shape("`conversations` must be a list of texts", texts)
    yield Conversation(until_answer(in_turn(texts, "conversations")))


def _from_alpaca(row: Row) -> Iterator[Conversation]:
    history = row.get("history") or []  # LLaMA-Factory: earlier questions and answers
    if not (isinstance(history, list) and all(_is_pair(each) for each in history)):
        raise wrong_shape("`history` must be a list of [question, answer]", history)
    earlier = in_turn(chain.from_iterable(history), "history")
    asked = earlier + read_prompt(row, "instruction")
    yield Conversation(with_system(row, [*asked, answer(row["output"], "output")]))


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2


def _from_self_instruct(row: Row) -> Iterator[Conversation]:
    instances = row["instances"] or []
    if not (isinstance(instances, list) and all(isinstance(each, dict) for each in instances)):
        raise wrong_shape("`instances` must be a list of input and output", instances)
    for instance in instances:
        asked = read_prompt({**instance, "instruction": row["instruction"]}, "instruction")
        yield Conversation([*asked, answer(instance.get("output"), "output")])


def _from_pair(row: Row) -> Iterator[Conversation]:
    asked, *answered = next(names for names in PAIRS if row.keys() >= set(names))
    turns = read_prompt(row, asked) + read_answer(row, *answered)
    yield Conversation(until_answer(with_system(row, turns)))


def _from_text(row: Row) -> Iterator[Conversation]:
    yield Conversation([], read_text(row["text"], "text"))


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
