# SPDX-License-Identifier: Apache-2.0
"""Which format rows have, and which conversation each row holds."""

import json
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

S, Q, A = ("system", "s"), ("user", "q"), ("assistant", "a")


def turn(role, content):
    return {"role": role, "content": content}


def old_turn(role, content):
    return {"from": role, "value": content}


# Name: a row, its format, and the conversations it holds as (role, content).
CASES = {
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "joined"},
        "alpaca",
        [[("user", "Add.\n\n1 2"), ("assistant", "3")]],
    ),
    "alpaca without input": (
        {"instruction": "q", "input": None, "output": "a"},
        "alpaca",
        [[Q, A]],
    ),
    "alpaca of LLaMA-Factory": (
        {"instruction": "q", "output": "a", "system": "s", "history": [["b", "1"]]},
        "alpaca",
        [[S, ("user", "b"), ("assistant", "1"), Q, A]],
    ),
    "sharegpt": (
        {
            "conversations": [
                old_turn("system", "s"),
                old_turn("human", "q"),
                old_turn("gpt", "a"),
                old_turn("human", "never answered"),
            ]
        },
        "sharegpt",
        [[S, Q, A]],
    ),
    "sharegpt stored by field": (
        {"conversations": {"from": ["user", "bard"], "value": ["q", "a"]}},
        "sharegpt",
        [[Q, A]],
    ),
    "messages next to a prompt": (
        {"prompt": "q", "messages": [turn(*Q), turn(*A)]},
        "messages",
        [[Q, A]],
    ),
    "messages in parts": (
        {
            "messages": [
                turn("user", [{"type": "text", "text": "q"}]),
                turn("assistant", [{"text": "a"}, {"text": "b"}]),
            ]
        },
        "messages",
        [[Q, ("assistant", "ab")]],
    ),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, "prompt-completion", [[Q, A]]),
    "prompt and completion as messages": (
        {"prompt": [turn(*S), turn(*Q)], "completion": [turn(*A)]},
        "prompt-completion",
        [[S, Q, A]],
    ),
    "s1K-1.1 trains the reasoning and the answer after it": (
        {
            "question": "q",
            "solution": "2",
            "deepseek_thinking_trajectory": "One and one.",
            "deepseek_attempt": "It is 2.",
        },
        "prompt-completion",
        [[Q, ("assistant", "One and one.\n\nIt is 2.")]],
    ),
    "LIMO trains the worked solution": (
        {"question": "q", "solution": "a", "answer": "2"},
        "prompt-completion",
        [[Q, A]],
    ),
    "OpenOrca": (
        {"system_prompt": "s", "question": "q", "response": "a"},
        "prompt-completion",
        [[S, Q, A]],
    ),
    "Dolly": (
        {"instruction": "q", "context": "c", "response": "a"},
        "prompt-completion",
        [[("user", "q\n\nc"), A]],
    ),
    "whole numbers": (
        {"question": "q", "answer": 2},
        "prompt-completion",
        [[Q, ("assistant", "2")]],
    ),
    "lima": (
        {"conversations": ["q", "a", "r", "b", "s"], "source": "x"},
        "lima",
        [[Q, A, ("user", "r"), ("assistant", "b")]],
    ),
    "self-instruct": (
        {
            "instruction": "q",
            "instances": [{"input": "a", "output": "A"}, {"input": "", "output": "a"}],
        },
        "self-instruct",
        [[("user", "q\n\na"), ("assistant", "A")], [Q, A]],
    ),
}

EMPTY = [
    {"instruction": "q", "output": " \n"},
    {"instruction": "q", "output": None},
    {"conversations": ["only a question"]},
    {"conversations": []},
    {"messages": [turn(*Q)]},
    {"messages": [turn("assistant", ""), turn(*Q)]},
    {"messages": None},
    {"text": ""},
]

# A row, the format that is forced, and the message.
REFUSED = [
    (
        {"conversations": [old_turn("narrator", "x")]},
        "sharegpt",
        r"A role must be one of system.*got 'narrator' in row 1",
    ),
    (
        {"messages": [turn("tool", "x")]},
        "messages",
        r"got a tool's \(role 'tool'\) in row 1: few chat templates",
    ),
    (
        {"messages": [{**turn("assistant", None), "tool_calls": [{"id": 1}]}]},
        "messages",
        r"got a tool's \(role 'assistant'\) in row 1",
    ),
    (
        {"messages": ["hello"]},
        "messages",
        r"must have role and content \(or from and value\), got 'hello' in row 1",
    ),
    ({"messages": "hello"}, "messages", r"`messages` must be a list.*str in row 1"),
    ({"conversations": "q"}, "lima", r"must be a list of texts, got str"),
    ({"text": 1.5}, "text", r"`text` must be text, got float in row 1"),
    ({"text": True}, "text", r"`text` must be text, got bool in row 1"),
    (
        {"instruction": "q", "output": "a", "history": ["x"]},
        "alpaca",
        r"`history` must be a list of \[question, answer\], got 'x' in row 1",
    ),
    (
        {"instruction": "q", "instances": ["x"]},
        "self-instruct",
        r"`instances` must be a list of input and output.*in row 1",
    ),
]


def turns(conversation):
    return [(message.role, message.content) for message in conversation.messages]


@pytest.fixture(scope="module")
def formats():
    from keylayers.data import formats

    return formats


@pytest.mark.parametrize("case", CASES)
def test_a_row_is_recognised_and_converted(formats, case):
    row, format, expected = CASES[case]
    assert formats.recognise(list(row), row) == format
    assert formats.require_columns(format, list(row)) == format
    found, num_dropped = formats.conversations([row], format)
    assert [turns(conversation) for conversation in found] == expected
    assert num_dropped == 0


def test_plain_text_stays_as_it_is_and_differs_from_a_message(formats):
    row = {"text": " Once. "}
    assert formats.recognise(["text"], row) == "text"
    text = formats.Conversation(text=" Once. ")
    assert formats.conversations([row], "text") == ([text], 0)
    message = formats.Conversation((formats.Message("assistant", " Once. "),))
    assert text.digest() != message.digest()


@pytest.mark.parametrize("row", EMPTY, ids=str)
def test_a_row_without_an_answer_is_dropped_and_counted(formats, row):
    format = formats.recognise(list(row), row)
    assert formats.conversations([row, row], format) == ([], 2)


@pytest.mark.parametrize(("row", "format", "message"), REFUSED)
def test_what_cannot_be_trained_is_refused_with_its_row(formats, row, format, message):
    from keylayers.errors import DataError

    with pytest.raises(DataError, match=message) as caught:
        formats.conversations([row], format)
    assert "\n" not in str(caught.value)


def test_rows_are_counted_from_one(formats):
    from keylayers.errors import DataError

    with pytest.raises(DataError, match="in row 3"):
        formats.conversations([{"text": "a"}, {"text": "b"}, {"text": 0.5}], "text")


def test_unknown_columns_are_listed_with_all_formats(formats):
    from keylayers.errors import DataError

    with pytest.raises(DataError, match="got body, title; known are") as caught:
        formats.recognise(["body", "title"], {})
    for name in ("`--format`", *(f"{format} (" for format in formats.FORMATS)):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "completion": "a", "label": True},
    ],
)
def test_preference_data_is_not_mistaken_for_answers(formats, row):
    from keylayers.errors import DataError

    with pytest.raises(DataError, match="got preference data"):
        formats.recognise(list(row), row)


@pytest.mark.parametrize(
    ("format", "columns", "message"),
    [
        ("alpaca", ["instruction", "x"], "'alpaca' needs.*; output missing from instruction"),
        ("prompt-completion", ["prompt"], "; completion missing from prompt"),
        ("text", [], "; text missing from no columns"),
        ("sharegtp", ["conversations"], re.escape("did you mean 'sharegpt'?")),
    ],
)
def test_a_forced_format_that_does_not_fit_is_refused(formats, format, columns, message):
    from keylayers.errors import KeylayersError

    with pytest.raises(KeylayersError, match=message):
        formats.require_columns(format, columns)


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text()), max_size=6))
def test_spellings_agree_and_every_conversation_ends_with_an_answer(found):
    from keylayers.data import formats

    messages = [{"messages": [turn(*each) for each in found]}]
    sharegpt = [{"conversations": [old_turn(*each) for each in found]}]
    usable, num_dropped = formats.conversations(messages, "messages")
    assert formats.conversations(sharegpt, "sharegpt") == (usable, num_dropped)
    assert len(usable) + num_dropped == 1
    for conversation in usable:
        assert conversation.messages[-1].role == "assistant"
        assert conversation.messages[-1].content.strip()
        assert turns(conversation) == found[: len(conversation.messages)]


@given(st.lists(st.text(), min_size=2, max_size=5), st.lists(st.text(), min_size=2, max_size=5))
def test_digests_are_equal_exactly_for_equal_conversations(left, right):
    from keylayers.data.formats import Conversation, Message

    first, second = (
        Conversation(tuple(Message("user", text) for text in texts)).digest()
        for texts in (left, right)
    )
    assert (first == second) == (left == right)


@pytest.mark.parametrize(
    ("name", "format", "count"),
    [("alpaca_gpt4_999.json", "alpaca", 999), ("user_oriented_252.jsonl", "self-instruct", 252)],
)
def test_real_data_is_recognised(formats, shared, name, format, count):
    text = (shared / "data/sft" / name).read_text(encoding="utf-8")
    rows = json.loads(text) if name.endswith(".json") else list(map(json.loads, text.splitlines()))
    assert formats.recognise(list(rows[0]), rows[0]) == format
    assert len(formats.conversations(rows, format)[0]) == count


def test_data_imports_neither_torch_nor_datasets():
    code = (
        "import sys, keylayers.data.prepare;"
        "print(sorted({'torch', 'transformers', 'datasets', 'jinja2'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
