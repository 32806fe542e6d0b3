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


def new(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def old(*turns):
    return [{"from": role, "value": content} for role, content in turns]


# Name: its format, the conversations it holds as (role, content), and the row.
CASES = {
    "alpaca": (
        "alpaca",
        [[("user", "Add.\n\n1 2"), ("assistant", "3")]],
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "joined"},
    ),
    "alpaca without input": (
        "alpaca",
        [[Q, A]],
        {"instruction": "q", "input": None, "output": "a"},
    ),
    "alpaca of LLaMA-Factory": (
        "alpaca",
        [[S, ("user", "b"), ("assistant", "1"), Q, A]],
        {"instruction": "q", "output": "a", "system": "s", "history": [["b", "1"]]},
    ),
    "sharegpt": (
        "sharegpt",
        [[S, Q, A]],
        {"conversations": old(S, ("human", "q"), ("gpt", "a"), ("human", "never answered"))},
    ),
    "sharegpt stored by field": (
        "sharegpt",
        [[Q, A]],
        {"conversations": {"from": ["user", "bard"], "value": ["q", "a"]}},
    ),
    "messages next to a prompt": ("messages", [[Q, A]], {"prompt": "q", "messages": new(Q, A)}),
    "messages in parts": (
        "messages",
        [[Q, ("assistant", "ab")]],
        {
            "messages": new(
                ("user", [{"type": "text", "text": "q"}]),
                ("assistant", [{"text": "a"}, {"text": "b"}]),
            )
        },
    ),
    "prompt and completion": ("prompt-completion", [[Q, A]], {"prompt": "q", "completion": "a"}),
    "prompt and completion as messages": (
        "prompt-completion",
        [[S, Q, A]],
        {"prompt": new(S, Q), "completion": new(A)},
    ),
    "s1K-1.1 trains the reasoning and the answer after it": (
        "prompt-completion",
        [[Q, ("assistant", "One and one.\n\nIt is 2.")]],
        {
            "question": "q",
            "solution": "2",
            "deepseek_thinking_trajectory": "One and one.",
            "deepseek_attempt": "It is 2.",
        },
    ),
    "LIMO trains the worked solution": (
        "prompt-completion",
        [[Q, A]],
        {"question": "q", "solution": "a", "answer": "2"},
    ),
    "OpenOrca": (
        "prompt-completion",
        [[S, Q, A]],
        {"system_prompt": "s", "question": "q", "response": "a"},
    ),
    "Dolly": (
        "prompt-completion",
        [[("user", "q\n\nc"), A]],
        {"instruction": "q", "context": "c", "response": "a"},
    ),
    "numbers": ("prompt-completion", [[Q, ("assistant", "2")]], {"question": "q", "answer": 2}),
    "lima": (
        "lima",
        [[Q, A, ("user", "r"), ("assistant", "b")]],
        {"conversations": ["q", "a", "r", "b", "s"], "source": "x"},
    ),
    "self-instruct": (
        "self-instruct",
        [[("user", "q\n\na"), ("assistant", "A")], [Q, A]],
        {
            "instruction": "q",
            "instances": [{"input": "a", "output": "A"}, {"input": "", "output": "a"}],
        },
    ),
}
EMPTY = [
    {"instruction": "q", "output": " \n"},
    {"instruction": "q", "output": None},
    {"conversations": ["only a question"]},
    {"conversations": []},
    {"messages": new(Q)},
    {"messages": new(("assistant", ""), Q)},
    {"messages": None},
    {"text": ""},
]
CALL = [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]
# The format that is forced, a row, and the message.
REFUSED = [
    ("sharegpt", {"conversations": old(("narrator", "x"))}, r"one of system.*got 'narrator' in"),
    ("messages", {"messages": new(("tool", "x"))}, r"a tool's \(role 'tool'\) in row 1: few chat"),
    ("messages", {"messages": CALL}, r"got a tool's \(role 'assistant'\) in row 1"),
    ("messages", {"messages": ["hi"]}, r"content \(or from and value\), got 'hi' in row 1"),
    ("messages", {"messages": "hello"}, r"`messages` must be a list.*str in row 1"),
    ("lima", {"conversations": "q"}, r"must be a list of texts, got str"),
    ("text", {"text": 1.5}, r"`text` must be text, got float in row 1"),
    ("text", {"text": True}, r"`text` must be text, got bool in row 1"),
    (
        "alpaca",
        {"instruction": "q", "output": "a", "history": ["x"]},
        r"`history` must be a list of \[question, answer\], got 'x' in row 1",
    ),
    (
        "self-instruct",
        {"instruction": "q", "instances": ["x"]},
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
    format, expected, row = CASES[case]
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


@pytest.mark.parametrize(("format", "row", "message"), REFUSED)
def test_what_cannot_be_trained_is_refused_with_its_row(formats, format, row, message):
    from keylayers.errors import DataError

    with pytest.raises(DataError, match=message) as caught:
        formats.conversations([row], format)
    assert "\n" not in str(caught.value)


def test_rows_are_counted_from_one(formats):
    with pytest.raises(ValueError, match="in row 3"):
        formats.conversations([{"text": "a"}, {"text": "b"}, {"text": 0.5}], "text")


def test_unknown_columns_are_listed_with_all_formats(formats):
    with pytest.raises(ValueError, match="got body, title; known are") as caught:
        formats.recognise(["body", "title"], {})
    for name in ("`--format`", *(f"{format} (" for format in formats.FORMATS)):
        assert name in str(caught.value)


def test_preference_data_is_not_mistaken_for_answers(formats):
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for row in (pair, {"prompt": "q", "completion": "a", "label": True}):
        with pytest.raises(ValueError, match="got preference data"):
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
    with pytest.raises(ValueError, match=message):
        formats.require_columns(format, columns)


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text()), max_size=6))
def test_spellings_agree_and_every_conversation_ends_with_an_answer(found):
    from keylayers.data import formats

    usable, num_dropped = formats.conversations([{"messages": new(*found)}], "messages")
    sharegpt = [{"conversations": old(*found)}]
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
