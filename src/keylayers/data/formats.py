# SPDX-License-Identifier: Apache-2.0
"""Rows of the common fine-tuning formats, turned into conversations.

A format is recognised by its columns. Every format but plain text becomes a list of messages with
the roles system, user and assistant, so the rest of keylayers handles a single form.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from keylayers.data.options import DataFormat
from keylayers.errors import ConfigError, DataError, did_you_mean

Role = Literal["system", "user", "assistant"]
Row = Mapping[str, object]

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
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bing", "bard"), "assistant"),
}
_TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython")
_SYSTEM_COLUMNS = ("system", "system_prompt")
_DOCUMENT_COLUMNS = ("input", "context")  # the text that an instruction refers to: Alpaca, Dolly


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """Messages that end with an answer, or a plain `text` that has no roles."""

    messages: tuple[Message, ...] = ()
    text: str | None = None

    def digest(self) -> bytes:
        """The SHA-256 of the canonical form; equal exactly for equal conversations."""
        turns = [[message.role, message.content] for message in self.messages]
        return hashlib.sha256(json.dumps([turns, self.text]).encode("ascii")).digest()


def recognise(columns: Collection[str], first_row: Row) -> DataFormat:
    """The format that the columns show.

    Args:
        columns: The names of all columns.
        first_row: Tells ShareGPT from LIMA, which use the same column.

    Raises:
        DataError: no format has these columns, or they hold preference data.
    """
    if {"chosen", "rejected"} <= set(columns) or isinstance(first_row.get("label"), bool):
        # It looks like plain answers, but half of them are answers to avoid.
        raise DataError(
            "Supervised fine-tuning needs answers to imitate, got preference data (columns "
            f"{', '.join(columns)}); choose an objective for preferences with `--objective`, keep "
            "the good answers only, or force a format with `--format`."
        )
    for format, (choices, _) in FORMATS.items():
        if any(set(names) <= set(columns) for names in choices):
            turns = first_row["conversations"] if format == "sharegpt" else None
            is_lima = isinstance(turns, list) and bool(turns) and isinstance(turns[0], str)
            return "lima" if is_lima else format
    known = "; ".join(f"{format} ({_describe(format)})" for format in FORMATS)
    raise DataError(
        f"The columns must fit a known format, got {', '.join(columns) or 'none'}; known are "
        f"{known}. Rename the columns, or force a format with `--format`."
    )


def require_columns(format: str, columns: Collection[str]) -> DataFormat:
    """The format that the user asked for, if these columns hold it.

    Raises:
        ConfigError: there is no such format.
        DataError: columns of the format are missing.
    """
    asked = next((known for known in FORMATS if known == format), None)
    if asked is None:
        raise ConfigError(
            f"`format` must be one of {', '.join(FORMATS)}, got {format!r}"
            f"{did_you_mean(format, FORMATS)}"
        )
    missing = [[name for name in names if name not in columns] for names in FORMATS[asked][0]]
    if all(missing):
        fewest = min(missing, key=len)
        raise DataError(
            f"The format {format!r} needs the columns {_describe(asked)}; "
            f"{', '.join(fewest)} missing from {', '.join(columns) or 'no columns'}. "
            "Rename the columns, or leave out `--format`."
        )
    return asked


def _describe(format: DataFormat) -> str:
    return " or ".join("+".join(names) for names in FORMATS[format][0])


def conversations(rows: Iterable[Row], format: DataFormat) -> tuple[list[Conversation], int]:
    """The conversations in the rows, in order, and how many had no answer to learn.

    Turns after the last answer are cut off. A conversation without an answer, or with an empty
    last answer, is dropped and counted.

    Raises:
        DataError: a value is not text, or a role is unknown; names the row, counted from 1.
    """
    _, convert = FORMATS[format]
    usable: list[Conversation] = []
    num_dropped_empty = 0
    for number, row in enumerate(rows, start=1):
        for found in convert(row, number):
            messages = until_answer(found.messages)
            answer = found.text or (messages[-1].content if messages else "")
            if answer.strip():
                usable.append(Conversation(messages, found.text))
            else:
                num_dropped_empty += 1
    return usable, num_dropped_empty


def until_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns up to the last answer; empty without an answer."""
    while messages and messages[-1].role != "assistant":
        messages = messages[:-1]
    return messages


def read_text(value: object, column: str, number: int) -> str:
    """The cell as text; an empty cell is an empty text.

    Raises:
        DataError: it holds something else; names the row.
    """
    if value is None:
        return ""
    if isinstance(value, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in value
    ):
        return "".join(part["text"] for part in value)  # content in parts, as for vision models
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # GSM8K's answers; floats are refused, as 1.50 would come back as 1.5
    if not isinstance(value, str):
        raise DataError(
            f"`{column}` must be text, got {type(value).__name__} in row {number}; "
            "turn it into text or remove the row."
        )
    return value


def read_system(row: Row, number: int) -> tuple[Message, ...]:
    """The system turn from a row's own column for it, or nothing."""
    for column in _SYSTEM_COLUMNS:
        if content := read_text(row.get(column), column, number):
            return (Message("system", content),)
    return ()


def read_question(row: Row, column: str, number: int) -> Message:
    """The user's turn: the question, and below it the document that it refers to."""
    names = [name for name in (column, *_DOCUMENT_COLUMNS) if row.get(name)]
    return Message("user", "\n\n".join(read_text(row.get(name), name, number) for name in names))


def read_messages(turns: object, column: str, number: int) -> tuple[Message, ...]:
    """The turns of a cell, as `role` and `content` or as `from` and `value`.

    Raises:
        DataError: it is no list of turns, or a role is unknown; names the row.
    """
    if isinstance(turns, dict) and all(isinstance(values, list) for values in turns.values()):
        # `datasets` stores a Sequence of structs as one list per field.
        fields = zip(*turns.values(), strict=True)
        turns = [dict(zip(turns, values, strict=True)) for values in fields]
    if turns is not None and not isinstance(turns, list):
        raise _wrong(f"`{column}` must be a list of turns", type(turns).__name__, number)
    return tuple(_message(turn, number) for turn in turns or ())


def _message(turn: object, number: int) -> Message:
    if not isinstance(turn, dict) or not ({"role", "from"} & turn.keys()):
        must = "A turn must have role and content (or from and value)"
        raise _wrong(must, f"{str(turn)[:60]!r}", number)
    role = turn.get("role") or turn.get("from")
    name = role if isinstance(role, str) else f"{role!s:.60}"
    if name in _TOOL_ROLES or turn.get("tool_calls"):
        raise DataError(
            f"A turn must be from system, user or assistant, got a tool's (role {name!r}) "
            f"in row {number}: few chat templates render these; remove such rows."
        )
    if name not in _ROLES:
        raise DataError(
            f"A role must be one of {', '.join(_ROLES)}, got {name!r} in row {number}; rename it."
        )
    column = "content" if "content" in turn else "value"
    return Message(_ROLES[name], read_text(turn.get(column), column, number))


def _wrong(must: str, got: str, number: int) -> DataError:
    return DataError(
        f"{must}, got {got} in row {number}; rewrite the row or force another `--format`."
    )


def _from_messages(row: Row, number: int) -> list[Conversation]:
    column = "messages" if "messages" in row else "conversations"
    found = read_messages(row[column], column, number)
    system = () if found[:1] and found[0].role == "system" else read_system(row, number)
    return [Conversation(system + found)]


def _from_lima(row: Row, number: int) -> list[Conversation]:
    turns = row["conversations"] or []
    if not isinstance(turns, list):
        raise _wrong("`conversations` must be a list of texts", type(turns).__name__, number)
    return [Conversation(_in_turn(turns, "conversations", number))]


def _in_turn(texts: Iterable[object], column: str, number: int) -> tuple[Message, ...]:
    """Texts of the user and the assistant, one after the other."""
    roles: tuple[Role, Role] = ("user", "assistant")
    read = [read_text(text, column, number) for text in texts]
    return tuple(Message(roles[index % 2], text) for index, text in enumerate(read))


def _from_alpaca(row: Row, number: int) -> list[Conversation]:
    answer = Message("assistant", read_text(row["output"], "output", number))
    history: list[Message] = []  # LLaMA-Factory: earlier turns as pairs of question and answer
    for pair in row.get("history") or ():  # type: ignore[attr-defined]
        if not (isinstance(pair, list) and len(pair) == 2):
            must = "`history` must be a list of [question, answer]"
            raise _wrong(must, f"{str(pair)[:60]!r}", number)
        history += _in_turn(pair, "history", number)
    question = read_question(row, "instruction", number)
    return [Conversation((*read_system(row, number), *history, question, answer))]


def _from_self_instruct(row: Row, number: int) -> list[Conversation]:
    instances = row["instances"] or []
    if not (isinstance(instances, list) and all(isinstance(each, dict) for each in instances)):
        must = "`instances` must be a list of input and output"
        raise _wrong(must, f"{str(instances)[:60]!r}", number)
    found = []
    for instance in instances:
        asked = {**instance, "instruction": row["instruction"]}
        question = read_question(asked, "instruction", number)
        answer = Message("assistant", read_text(instance.get("output"), "output", number))
        found.append(Conversation((question, answer)))
    return found


def _from_pair(row: Row, number: int) -> list[Conversation]:
    asked, *parts = next(pair for pair in PAIRS if set(pair) <= row.keys())
    if isinstance(row[asked], list):
        question = read_messages(row[asked], asked, number)
    else:
        question = (*read_system(row, number), read_question(row, asked, number))
    if len(parts) == 1 and isinstance(row[parts[0]], list):
        return [Conversation(question + read_messages(row[parts[0]], parts[0], number))]
    texts = [read_text(row[part], part, number) for part in parts]
    answer = Message("assistant", "\n\n".join(text for text in texts if text))
    return [Conversation((*question, answer))]


def _from_text(row: Row, number: int) -> list[Conversation]:
    return [Conversation(text=read_text(row["text"], "text", number))]


# Each format's columns, as alternatives, and its converter. The first match wins: UltraChat and No
# Robots have `prompt` as well as `messages`, and Alpaca has the joined `text` next to its own.
FORMATS: dict[
    DataFormat, tuple[tuple[tuple[str, ...], ...], Callable[[Row, int], list[Conversation]]]
] = {
    "messages": ((("messages",),), _from_messages),
    "sharegpt": ((("conversations",),), _from_messages),
    "lima": ((("conversations",),), _from_lima),
    "self-instruct": ((("instruction", "instances"),), _from_self_instruct),
    "alpaca": ((("instruction", "output"),), _from_alpaca),
    "prompt-completion": (PAIRS, _from_pair),
    "text": ((("text",),), _from_text),
}

# Every column that may hold text, for readers that would guess a type instead.
TEXT_COLUMNS = (
    *dict.fromkeys(name for choices, _ in FORMATS.values() for names in choices for name in names),
    *_SYSTEM_COLUMNS,
    *_DOCUMENT_COLUMNS,
    "chosen",
    "rejected",
)
