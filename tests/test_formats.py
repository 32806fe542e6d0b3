# SPDX-License-Identifier: Apache-2.0
"""Which format rows are in, and what conversation each row holds."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

# A row, its format, and the conversations it holds as (role, content).
CASES = {
    "alpaca": (
        {"instruction": "Add.", "input": "1 2", "output": "3", "text": "joined"},
        "alpaca",
        [[("user", "Add.\n\n1 2"), ("assistant", "3")]],
    ),
    "alpaca without input": (
        {"instruction": "Hi", "input": None, "output": "Hello"},
        "alpaca",
        [[("user", "Hi"), ("assistant", "Hello")]],
    ),
    "alpaca of LLaMA-Factory": (
        {"instruction": "b", "output": "2", "system": "Be brief.", "history": [["a", "1"]]},
        "alpaca",
        [
            [
                ("system", "Be brief."),
                ("user", "a"),
                ("assistant", "1"),
                ("user", "b"),
                ("assistant", "2"),
            ]
        ],
    ),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "a"},
                {"from": "human", "value": "never answered"},
            ]
        },
        "sharegpt",
        [[("system", "s"), ("user", "q"), ("assistant", "a")]],
    ),
    "sharegpt stored by field": (
        {"conversations": {"from": ["user", "bard"], "value": ["q", "a"]}},
        "sharegpt",
        [[("user", "q"), ("assistant", "a")]],
    ),
    "messages beside a prompt": (
        {
            "prompt": "q",
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        },
        "messages",
        [[("user", "q"), ("assistant", "a")]],
    ),
    "messages in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {"role": "assistant", "content": [{"text": "a"}, {"text": "b"}]},
            ]
        },
        "messages",
        [[("user", "q"), ("assistant", "ab")]],
    ),
    "prompt and completion": (
        {"prompt": "q", "completion": "a"},
        "prompt-completion",
        [[("user", "q"), ("assistant", "a")]],
    ),
    "prompt and completion as messages": (
        {
            "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "a"}],
        },
        "prompt-completion",
        [[("system", "s"), ("user", "q"), ("assistant", "a")]],
    ),
    "s1K-1.1 trains the reasoning and the answer after it": (
        {
            "question": "1+1?",
            "solution": "2",
            "deepseek_thinking_trajectory": "One and one.",
            "deepseek_attempt": "It is 2.",
        },
        "prompt-completion",
        [[("user", "1+1?"), ("assistant", "One and one.\n\nIt is 2.")]],
    ),
    "LIMO trains the worked solution": (
        {"question": "1+1?", "solution": "One and one is 2.", "answer": "2"},
        "prompt-completion",
        [[("user", "1+1?"), ("assistant", "One and one is 2.")]],
    ),
    "OpenOrca": (
        {"system_prompt": "s", "question": "q", "response": "a"},
        "prompt-completion",
        [[("system", "s"), ("user", "q"), ("assistant", "a")]],
    ),
    "Dolly": (
        {"instruction": "q", "context": "c", "response": "a"},
        "prompt-completion",
        [[("user", "q\n\nc"), ("assistant", "a")]],
    ),
    "whole numbers": (
        {"question": "1+1", "answer": 2},
        "prompt-completion",
        [[("user", "1+1"), ("assistant", "2")]],
    ),
    "lima": (
        {"conversations": ["q", "a", "r", "b", "s"], "source": "x"},
        "lima",
        [[("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]],
    ),
    "self-instruct": (
        {
            "instruction": "Up.",
            "instances": [{"input": "a", "output": "A"}, {"input": "", "output": "B"}],
        },
        "self-instruct",
        [
            [("user", "Up.\n\na"), ("assistant", "A")],
            [("user", "Up."), ("assistant", "B")],
        ],
    ),
}

# Rows with nothing to learn.
EMPTY = [
    {"instruction": "q", "output": " \n"},
    {"instruction": "q", "output": None},
    {"conversations": ["only a question"]},
    {"conversations": []},
    {"messages": [{"role": "user", "content": "q"}]},
    {"messages": [{"role": "assistant", "content": ""}, {"role": "user", "content": "q"}]},
    {"messages": None},
    {"text": ""},
]

# A row, the format insisted on, and the message.
REFUSED = {
    "unknown role": (
        {"conversations": [{"from": "narrator", "value": "x"}]},
        "sharegpt",
        r"A role must be one of system.*got 'narrator' in row 1",
    ),
    "tool": (
        {"messages": [{"role": "tool", "content": "x"}]},
        "messages",
        r"got a tool's \(role 'tool'\) in row 1: few chat templates",
    ),
    "tool call": (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": 1}]}]},
        "messages",
        r"got a tool's \(role 'assistant'\) in row 1",
    ),
    "turn without role": (
        {"messages": ["hello"]},
        "messages",
        r"must have role and content \(or from and value\), got 'hello' in row 1",
    ),
    "not a list": ({"messages": "hello"}, "messages", r"`messages` must be a list.*str in row 1"),
    "lima not a list": ({"conversations": "q"}, "lima", r"must be a list of texts, got str"),
    "float": ({"text": 1.5}, "text", r"`text` must be text, got float in row 1"),
    "bool": ({"text": True}, "text", r"`text` must be text, got bool in row 1"),
    "history": (
        {"instruction": "q", "output": "a", "history": ["x"]},
        "alpaca",
        r"`history` must be a list of \[question, answer\], got 'x' in row 1",
    ),
    "instances": (
        {"instruction": "q", "instances": ["x"]},
        "self-instruct",
        r"`instances` must be a list of input and output.*in row 1",
    ),
}


def turns(conversation):
    return [(message.role, message.content) for message in conversation.messages]


@pytest.fixture(scope="module")
def formats():
    from keylayers.training import formats

    return formats


@pytest.mark.parametrize("case", CASES)
def test_a_row_is_recognised_and_converted(formats, case):
    row, format, expected = CASES[case]
    assert formats.recognise(list(row), row) == format
    converted = formats.conversations([row], format)
    assert [turns(one) for one in converted.conversations] == expected
    assert converted.num_dropped_empty == 0


def test_plain_text_stays_as_it_is(formats):
    row = {"text": " Once. "}
    assert formats.recognise(["text"], row) == "text"
    assert formats.conversations([row], "text").conversations == [
        formats.Conversation(text=" Once. ")
    ]


@pytest.mark.parametrize("row", EMPTY, ids=str)
def test_a_row_without_an_answer_is_dropped_and_counted(formats, row):
    format = formats.recognise(list(row), row)
    assert formats.conversations([row, row], format) == formats.Converted([], 2)


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_trained_is_refused_with_its_row(formats, case):
    from keylayers.errors import DataError

    row, format, message = REFUSED[case]
    with pytest.raises(DataError, match=message) as caught:
        formats.conversations([row], format)
    assert "\n" not in str(caught.value)


def test_the_row_number_counts_from_one(formats):
    from keylayers.errors import DataError

    with pytest.raises(DataError, match="in row 3"):
        formats.conversations([{"text": "a"}, {"text": "b"}, {"text": 0.5}], "text")


def test_unknown_columns_are_listed_beside_all_formats(formats):
    from keylayers.errors import DataError

    with pytest.raises(DataError, match="got body, title; known are") as caught:
        formats.recognise(["body", "title"], {})
    assert "`--format`" in str(caught.value)
    for format in formats.FORMATS:
        assert f"{format} (" in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "completion": "a", "label": True},
    ],
    ids=["dpo", "kto"],
)
def test_preference_data_is_not_mistaken_for_answers(formats, row):
    from keylayers.errors import DataError

    with pytest.raises(DataError, match="got preference data"):
        formats.recognise(list(row), row)


@pytest.mark.parametrize(
    ("format", "columns", "message"),
    [
        (
            "alpaca",
            ["instruction", "response"],
            "'alpaca' needs.*; output missing from instruction",
        ),
        ("prompt-completion", ["prompt"], "; completion missing from prompt"),
        ("text", [], "; text missing from no columns"),
    ],
)
def test_an_insisted_format_names_the_missing_columns(formats, format, columns, message):
    from keylayers.errors import DataError

    with pytest.raises(DataError, match=message):
        formats.require_columns(format, columns)


def test_a_misspelt_format_gets_a_suggestion(formats):
    from keylayers.errors import ConfigError

    with pytest.raises(ConfigError, match=re.escape("did you mean 'sharegpt'?")):
        formats.require_columns("sharegtp", ["conversations"])


def test_every_format_accepts_its_own_columns(formats):
    for row, format, _ in CASES.values():
        formats.require_columns(format, list(row))


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text()), max_size=6))
def test_spellings_agree_and_every_conversation_ends_with_an_answer(found):
    from keylayers.training import formats

    messages = [{"messages": [{"role": role, "content": text} for role, text in found]}]
    sharegpt = [{"conversations": [{"from": role, "value": text} for role, text in found]}]
    one = formats.conversations(messages, "messages")
    other = formats.conversations(sharegpt, "sharegpt")
    assert one == other
    assert len(one.conversations) + one.num_dropped_empty == 1
    for conversation in one.conversations:
        assert conversation.messages[-1].role == "assistant"
        assert conversation.messages[-1].content.strip()
        assert turns(conversation) == found[: len(conversation.messages)]


@given(st.lists(st.text(), min_size=2, max_size=5), st.lists(st.text(), min_size=2, max_size=5))
def test_digests_are_equal_exactly_for_equal_conversations(left, right):
    from keylayers.data.formats import Conversation, Message

    one, other = (
        Conversation(tuple(Message("user", text) for text in texts)) for texts in (left, right)
    )
    assert (one.digest() == other.digest()) == (left == right)


def test_a_plain_text_and_a_message_of_it_differ_in_digest(formats):
    text = formats.Conversation(text="a")
    message = formats.Conversation((formats.Message("assistant", "a"),))
    assert text.digest() != message.digest()


def test_real_data_is_recognised(formats, shared):
    rows = json.loads((shared / "data/sft/alpaca_gpt4_999.json").read_text(encoding="utf-8"))
    assert formats.recognise(list(rows[0]), rows[0]) == "alpaca"
    assert len(formats.conversations(rows, "alpaca").conversations) == 999
    lines = (shared / "data/sft/user_oriented_252.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert formats.recognise(list(rows[0]), rows[0]) == "self-instruct"
    assert len(formats.conversations(rows, "self-instruct").conversations) == 252


def test_formats_import_neither_torch_nor_datasets():
    import subprocess
    import sys

    code = (
        "import sys, keylayers.data.formats, keylayers.data.chat, keylayers.data.prepare;"
        "print(sorted({'torch', 'transformers', 'datasets', 'jinja2'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
