# SPDX-License-Identifier: Apache-2.0
"""Turns of a conversation, read from the cells of a row in the spellings that data sets use."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import cycle, zip_longest
from typing import Literal, TypedDict

from keylayers.errors import DataError

Role = Literal["system", "user", "assistant"]
Row = Mapping[str, object]

SYSTEM_COLUMNS = ("system", "system_prompt")
DOCUMENT_COLUMNS = ("input", "context")  # the text that an instruction refers to: Alpaca, Dolly
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bing", "bard"), "assistant"),
}
_TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython")


class Message(TypedDict):
    """A turn in the form that chat templates and TRL take."""

    role: Role
    content: str


def values_of(messages: Iterable[Message]) -> list[list[str]]:
    """Role and content of each turn, as digests count them."""
    return [[message["role"], message["content"]] for message in messages]


def digest(*content: object) -> bytes:
    """The SHA-256 of values of JSON."""
    return hashlib.sha256(json.dumps(content).encode("ascii")).digest()


def read_text(value: object, name: str) -> str:
    """The text of a cell or of a turn's field; empty for null."""
    if value is None:
        return ""
    if isinstance(value, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in value
    ):
        return "".join(part["text"] for part in value)  # content in parts, as for vision models
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # GSM8K's answers; floats are refused, as 1.50 would come back as 1.5
    if not isinstance(value, str):
        must = f"`{name}` must be text, got {type(value).__name__}"
        raise DataError(f"{must}; turn it into text or remove the row.")
    return value


def read_messages(value: object, column: str) -> list[Message]:
    """The turns of a cell: a list of turns, a single turn, or a list for each field of a turn."""
    if isinstance(value, dict):
        # `datasets` stores a Sequence of structs as one list per field.
        is_by_field = all(isinstance(field, list) for field in value.values())
        turns = zip_longest(*value.values()) if is_by_field else [value.values()]
        value = [dict(zip(value, turn, strict=True)) for turn in turns]
    if value is not None and not isinstance(value, list):
        raise wrong_shape(f"`{column}` must be a list of turns", value)
    return [_read_message(turn) for turn in value or ()]


def _read_message(turn: object) -> Message:
    """A turn with `role` and `content`, or with `from` and `value`."""
    if not isinstance(turn, dict) or not ({"role", "from"} & turn.keys()):
        raise wrong_shape("A turn must have role and content (or from and value)", turn)
    role = str(turn.get("role") or turn.get("from"))[:60]
    if role in _TOOL_ROLES or turn.get("tool_calls"):
        raise DataError(
            f"A turn must be from system, user or assistant, got a tool's (role {role!r}): few "
            "chat templates render these; remove such rows."
        )
    if role not in _ROLES:
        raise DataError(f"A role must be one of {', '.join(_ROLES)}, got {role!r}; rename it.")
    content = "content" if "content" in turn else "value"
    return Message(role=_ROLES[role], content=read_text(turn.get(content), content))


def wrong_shape(must: str, got: object) -> DataError:
    """The error about a value that has other parts than its format has."""
    return DataError(f"{must}, got {got!r:.60}; rewrite the row or force another `--format`.")


def read_prompt(row: Row, column: str) -> list[Message]:
    """Turns before the answer, or a question with the document that it refers to below it."""
    if isinstance(row[column], (list, dict)):
        return read_messages(row[column], column)
    names = [name for name in (column, *DOCUMENT_COLUMNS) if row.get(name)]
    text = "\n\n".join(read_text(row[name], name) for name in names)
    return [Message(role="user", content=text)]


def answer(value: object, column: str) -> Message:
    """The assistant's turn with a cell's text."""
    return Message(role="assistant", content=read_text(value, column))


def read_answer(row: Row, *columns: str) -> list[Message]:
    """Turns that end with the answer, or its text, from several columns if it has parts."""
    if isinstance(row[columns[0]], (list, dict)):
        return read_messages(row[columns[0]], columns[0])
    parts = [read_text(row[column], column) for column in columns]
    return [Message(role="assistant", content="\n\n".join(part for part in parts if part))]


def in_turn(texts: Iterable[object], column: str) -> list[Message]:
    """Texts of the user and the assistant, one after the other."""
    roles: tuple[Role, Role] = ("user", "assistant")
    turns = zip(cycle(roles), texts, strict=False)
    return [Message(role=role, content=read_text(text, column)) for role, text in turns]


def with_system(row: Row, messages: list[Message]) -> list[Message]:
    """The turns, opened by the text of the row's system column unless they have their own."""
    if messages[:1] and messages[0]["role"] == "system":
        return messages
    texts = [read_text(row.get(column), column) for column in SYSTEM_COLUMNS]
    return [Message(role="system", content=text) for text in texts if text][:1] + messages


def until_answer(messages: list[Message]) -> list[Message]:
    """The turns up to the last answer; empty without an answer."""
    while messages and messages[-1]["role"] != "assistant":
        messages = messages[:-1]
    return messages
