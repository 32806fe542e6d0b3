# SPDX-License-Identifier: Apache-2.0
"""Turns of a conversation, read from the cells of a row in the spellings that data sets use."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle, zip_longest
from typing import Any, Literal, TypeAlias

from keylayers.errors import DataError

Role = Literal["system", "user", "assistant", "tool"]
Row = Mapping[str, object]
# A turn in the form that chat templates and TRL take: `role`, `content`, and every other field that
# its row gives it, under its own name. An answer that must not be learned has `weight` 0.
Message: TypeAlias = dict[str, Any]

SYSTEM_COLUMNS = ("system", "system_prompt")
DOCUMENT_COLUMNS = ("input", "context")  # the text that an instruction refers to: Alpaca, Dolly
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("tool", "tool_response", "function", "function_response"), "tool"),
    **dict.fromkeys(("observation", "ipython"), "tool"),
}
_CALL_ROLES = ("function_call", "tool_call")  # LLaMA-Factory, ms-swift: a call as JSON text
_SPELLINGS = ("role", "from", "content", "value")
# Fields that say whether a turn is learned: OpenAI's (`weight`), axolotl's and open-instruct's
# (`train`, `training`, `train_on_turn`), ms-swift's (`loss`), those of verl and LoongForge
# (`trainable`, `loss_mask`); and torchtune's (`masked`), which says the opposite.
_LEARNED = (
    *("weight", "train", "training", "train_on_turn"),
    *("loss", "trainable", "loss_mask", "learn"),
)
_MASKED = ("masked", "mask")
_PARTLY = ("train_detail", "training_detail")  # axolotl's spans of characters
_FLAGS = {"true": True, "1": True, "false": False, "0": False}


@contextmanager
def in_row(number: int) -> Iterator[None]:
    """Name the row in an error about it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"Row {number}: {error}") from error
    except RecursionError as error:
        raise DataError(f"Row {number}: its fields are nested too deep; remove it.") from error


def values_of(messages: Iterable[Message]) -> list[list[object]]:
    """Role, content and other fields of each turn, as digests count them."""
    both = [(message, other_fields(message)) for message in messages]
    return [[turn["role"], turn["content"], *([more] if more else [])] for turn, more in both]


def other_fields(message: Message) -> dict[str, object]:
    """What a turn holds next to role and content."""
    return {name: message[name] for name in message if name not in ("role", "content")}


def digest(*content: object) -> bytes:
    """The SHA-256 of values of JSON."""
    return hashlib.sha256(json.dumps(content, default=str).encode("ascii")).digest()


def read_text(value: object, name: str) -> str:
    """The text of a cell or of a turn's field; empty for null."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return "".join(_read_part(part, name) for part in value)  # as for vision models
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # GSM8K's answers; floats are refused, as 1.50 would come back as 1.5
    if not isinstance(value, str):
        must = f"`{name}` must be text, got {type(value).__name__}"
        raise DataError(f"{must}; turn it into text or remove the row.")
    return value


def _read_part(part: dict[str, object], name: str) -> str:
    if not isinstance(part.get("text"), str):
        raise DataError(
            f"`{name}` must be text, got a part of type {part.get('type')!r:.60}: keylayers trains "
            "on text only; turn it into text or remove the row."
        )
    return str(part["text"])


def flag_of(value: object) -> bool | None:
    """The boolean that a value means: 0 or 1 too (floats if nulls were between) or such text."""
    if isinstance(value, str):
        return _FLAGS.get(value.lower())
    return bool(value) if isinstance(value, (int, float)) and value in (0, 1) else None


def read_flag(value: object, name: str) -> bool:
    """The boolean that a cell or a field means."""
    if (flag := flag_of(value)) is None:
        raise DataError(f"`{name}` must be true or false, got {value!r:.60}; fix the row.")
    return flag


def read_messages(value: object, column: str) -> list[Message]:
    """The turns of a cell: a list of turns, a single turn, or a list for each field of a turn."""
    if isinstance(value, dict):
        # `datasets` stores a Sequence of structs as one list per field.
        value = {name: field for name, field in value.items() if field is not None}
        is_by_field = all(isinstance(field, list) for field in value.values())
        turns = zip_longest(*value.values()) if is_by_field else [value.values()]
        value = [dict(zip(value, turn, strict=True)) for turn in turns]
    if value is not None and not isinstance(value, list):
        raise wrong_shape(f"`{column}` must be a list of turns", value)
    return [_read_message(turn) for turn in value or ()]


def _read_message(turn: object) -> Message:
    """A turn in either spelling, or in both with nulls between, as Arrow joins them."""
    given = _without_nulls(turn)
    if not isinstance(given, dict) or not ({"role", "from"} & given.keys()):
        raise wrong_shape("A turn must have role and content (or from and value)", turn)
    role = str(given.get("role") or given.get("from"))[:60]
    if role not in (*_ROLES, *_CALL_ROLES):
        raise DataError(f"A role must be one of {', '.join(_ROLES)}, got {role!r}; rename it.")
    content = "value" if given.get("content", "") == "" and "value" in given else "content"
    message = Message(role=_ROLES.get(role, "assistant"), content="")
    message |= {name: given[name] for name in given if name not in _SPELLINGS}
    if role in _CALL_ROLES:
        message["tool_calls"] = _read_json(given.get(content), role)
    else:
        message["content"] = read_text(given.get(content), content)
    called = message.pop("function_call", None)  # OpenAI's older spelling
    if calls := _listed(message.pop("tool_calls", None) or called):
        message["tool_calls"] = [_read_call(call) for call in calls]
    return _marked(message)


def _marked(message: Message) -> Message:
    """The turn with `weight` 0 if it must not be learned, in place of all fields that say so."""
    if partly := [name for name in _PARTLY if name in message]:
        raise DataError(
            f"A turn is learned whole or not at all, got {partly[0]!r}, which marks parts of it; "
            "mark whole turns with `weight`."
        )
    says = [read_flag(message[name], name) for name in _LEARNED if name in message]
    says += [not read_flag(message[name], name) for name in _MASKED if name in message]
    message = {name: message[name] for name in message if name not in (*_LEARNED, *_MASKED)}
    if message["role"] == "assistant" and (is_silent(message) or not all(says)):
        message["weight"] = 0
    return message


def is_silent(message: Message) -> bool:
    """Whether a turn neither says anything nor calls a tool."""
    return not message["content"].strip() and not message.get("tool_calls")


def is_learned(message: Message) -> bool:
    """Whether a turn is an answer that the loss counts."""
    return message["role"] == "assistant" and message.get("weight") != 0


def _read_call(call: object) -> object:
    """A call of a tool as templates take it: `function` with `name` and `arguments` as an object.

    Data often have arguments as JSON text, which templates would quote once more.
    """
    if isinstance(call, dict) and "function" not in call:
        call = {"type": "function", "function": call}
    function = call["function"] if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or "name" not in function:
        raise wrong_shape("A call of a tool must have a name and arguments", call)
    if isinstance(function.get("arguments"), str):
        arguments = _read_json(function["arguments"] or "{}", "arguments")
        return call | {"function": function | {"arguments": arguments}}
    return call


def read_tools(value: object) -> list[object] | None:
    """The descriptions of tools, which may be JSON text, whole or one by one; None without any."""
    tools = [_read_json(tool, "tools") for tool in _listed(_read_json(value or None, "tools"))]
    return [_without_nulls(tool) for tool in tools] or None


def _read_json(value: object, name: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise DataError(f"`{name}` must be JSON, got {value!r:.60}; fix the row.") from error


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value] if value else []


def _without_nulls(value: object) -> object:
    """Without the fields that Arrow adds to objects in a list so that all have the same."""
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def wrong_shape(must: str, got: object) -> DataError:
    """The error about a value that has other parts than its format has."""
    return DataError(f"{must}, got {got!r:.60}; rewrite the row or force another `--format`.")


def read_prompt(row: Row, column: str) -> list[Message]:
    """Turns before the answer, or a question with the document that it refers to below it."""
    if isinstance(row.get(column), (list, dict)):
        return read_messages(row[column], column)
    names = [name for name in (column, *DOCUMENT_COLUMNS) if row.get(name)]
    text = "\n\n".join(read_text(row[name], name) for name in names)
    return [Message(role="user", content=text)]


def answer(value: object, column: str) -> Message:
    """The assistant's turn with a cell's text."""
    return _marked(Message(role="assistant", content=read_text(value, column)))


def read_answer(row: Row, *columns: str) -> list[Message]:
    """Turns that end with the answer, or its text, from several columns if it has parts."""
    if isinstance(row.get(columns[0]), (list, dict)):
        return read_messages(row[columns[0]], columns[0])
    parts = [read_text(row.get(column), column) for column in columns]
    return [answer("\n\n".join(part for part in parts if part), columns[0])]


def in_turn(texts: Iterable[object], column: str) -> list[Message]:
    """Texts of the user and the assistant, one after the other."""
    roles: tuple[Role, Role] = ("user", "assistant")
    turns = zip(cycle(roles), texts, strict=False)
    return [_marked(Message(role=role, content=read_text(text, column))) for role, text in turns]


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
