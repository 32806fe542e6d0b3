# SPDX-License-Identifier: Apache-2.0
"""Which format rows have, and which conversation or preference each row holds."""

import json
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keylayers.data.formats import FORMATS, PAIRS, Conversation, conversations_of, read_format
from keylayers.data.preferences import FORMAT_OF, PREFERENCES, Preference, require_columns
from keylayers.data.reading import convert_rows
from keylayers.errors import DataError

ROLES = {"S": "system", "U": "user", "A": "assistant"}
HUMAN = {"S": "system", "U": "human", "A": "gpt"}


def new(turns, roles=ROLES, names=("role", "content")):
    """Turns as role and content, from "U: a question | A: its answer"."""
    split = [turn.split(": ", 1) for turn in turns.split(" | ")]
    return [dict(zip(names, (roles[role], text), strict=True)) for role, text in split]


def old(turns):
    """The same as `from` and `value`, with ShareGPT's roles."""
    return new(turns, HUMAN, ("from", "value"))


def read(*rows, format=None):
    """The format, the conversations as turns, and how many have no answer."""
    is_forced, format = format is not None, read_format(rows[0], format)
    convert = partial(conversations_of, format=format, is_forced=is_forced)
    found = convert_rows(rows, format, convert)
    return format, [each.messages for each in found.examples], found.num_dropped_empty


IN_PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "q"}]},
    {"role": "assistant", "content": [{"text": "a"}, {"text": "b"}]},
]
S1K = {"deepseek_thinking_trajectory": "1 and 1.", "deepseek_attempt": "It is 2."}
TWO = [{"input": "a", "output": "A"}, {"input": "", "output": "a"}]
# A format, and rows with the conversations that they hold.
CASES = {
    "alpaca": [
        ({"instruction": "q", "input": "1 2", "output": "3", "text": "both"}, "U: q\n\n1 2 | A: 3"),
        ({"instruction": "q", "input": None, "output": "a"}, "U: q | A: a"),
        (  # LLaMA-Factory
            {"instruction": "q", "output": "a", "system": "s", "history": [["b", "1"]]},
            "S: s | U: b | A: 1 | U: q | A: a",
        ),
    ],
    "sharegpt": [
        ({"conversations": old("S: s | U: q | A: a | U: never answered")}, "S: s | U: q | A: a"),
        ({"conversations": {"from": ["user", "bard"], "value": ["q", "a"]}}, "U: q | A: a"),
    ],
    "messages": [
        ({"messages": new("U: q | A: a"), "prompt": "q", "system": "s"}, "S: s | U: q | A: a"),
        ({"messages": IN_PARTS}, "U: q | A: ab"),
    ],
    "prompt-completion": [
        *(({names[0]: "q", names[-1]: "a"}, "U: q | A: a") for names in PAIRS if len(names) == 2),
        ({"prompt": new("S: s | U: q"), "completion": new("A: a")}, "S: s | U: q | A: a"),
        ({"prompt": new("U: q"), "completion": "a", "system": "s"}, "S: s | U: q | A: a"),
        ({"question": "q", "answer": 2}, "U: q | A: 2"),
        ({"prompt": "", "completion": "a"}, "U:  | A: a"),
        ({"instruction": None, "context": "c", "response": "a"}, "U: c | A: a"),
        ({"question": "q", "solution": "a", "answer": "2"}, "U: q | A: a"),  # LIMO
        ({"question": "q", "solution": "2"} | S1K, "U: q | A: 1 and 1.\n\nIt is 2."),
        ({"system_prompt": "s", "question": "q", "response": "a"}, "S: s | U: q | A: a"),
        ({"instruction": "q", "context": "c", "response": "a"}, "U: q\n\nc | A: a"),  # Dolly
    ],
    "lima": [({"conversations": ["q", "a", "r", "b", "s"]}, "U: q | A: a | U: r | A: b")],
    "self-instruct": [({"instruction": "q", "instances": TWO}, "U: q\n\na | A: A", "U: q | A: a")],
}


@pytest.mark.parametrize("case", [(name, *row) for name, rows in CASES.items() for row in rows])
def test_a_row_is_recognised_and_converted(case):
    format, row, *expected = case
    assert read(row) == (format, [new(turns) for turns in expected], 0)
    assert read_format(row, format) == format


def test_digests_tell_conversations_apart():
    assert list(FORMATS["text"][1]({"text": " Once. "})) == [Conversation([], text=" Once. ")]
    found = (
        *(Conversation(new(turns)) for turns in ("U: ab", "U: a | U: b", "A: ab")),
        *(Conversation([], text=text) for text in ("ab", "", None)),
        Conversation([new("U: ab")[0] | {"name": "x"}]),
        Preference(new("U: ab"), (new("A: c"),), is_good=True),
        Preference(new("U: ab"), (new("A: c"),), is_good=False),
        Preference(new("U: ab"), (new("A: c"), [])),
        Preference(new("U: ab | A: c"), ([], [])),
    )
    assert len({each.digest() for each in found}) == len(found)


QA, SPOKEN = new("U: q | A: a"), old("U: q | A: a")
NULLS = {"role": None, "content": None, "from": None, "value": None}
# Rows of two data sets that were joined, so that each has the columns of both.
JOINED = [
    [{"messages": [NULLS | turn for turn in turns]} for turns in (QA, SPOKEN)],
    [{"messages": QA}, {"conversations": SPOKEN}],
    [{"instruction": "q", "output": "a"}, {"prompt": "q", "completion": "a"}],
    [{"question": "q", "answer": "a"}, {"instruction": "q", "response": "a"}],
    [{"messages": QA}, {"instruction": "q", "output": "a"}],
]


@pytest.mark.parametrize("rows", JOINED, ids=str)
@pytest.mark.parametrize("nothing", [None, ""])
def test_rows_of_joined_data_sets_are_read_whatever_is_null(rows, nothing):
    columns = dict.fromkeys([*rows[0], *rows[1]], nothing)
    for both in (rows, rows[::-1]):
        format = read_format(both[0], None)  # gets the columns that hold something
        convert = partial(conversations_of, format=format, is_forced=False)
        found = convert_rows([columns | row for row in both], format, convert)
        assert [each.messages for each in found.examples] == 2 * [QA]
        assert [each.row_number for each in found.examples] == [1, 2]


WITHOUT_ANSWER = [
    {"instruction": "q", "output": " \n"}, {"instruction": "q", "output": None}, {"text": ""},
    {"conversations": ["only a question"]}, {"conversations": []}, {"messages": None},
    {"messages": new("U: q")}, {"messages": new("A:  | U: q")},
]  # fmt: skip


@pytest.mark.parametrize("row", WITHOUT_ANSWER, ids=str)
def test_a_row_without_an_answer_has_nothing_to_learn(row):
    with pytest.raises(ValueError, match="answers to learn, got 2 examples without one"):
        read(row, row)


def test_rows_without_an_answer_are_dropped_and_counted():
    assert read({"text": ""}, {"text": "a"}, {"text": " "})[1:] == ([[]], 2)
    asked = {"prompt": "Hi?"}
    rows = [asked | {"chosen": "Good.", "rejected": " "}, {"prompt": ""} | TEXT, asked | TEXT]
    found = convert_rows(rows, "pairs", PREFERENCES["pairs"])
    assert [each.row_number for each in found.examples] == [3]
    assert found.num_dropped_empty == 2


TEXT = {"chosen": "Good.", "rejected": "Bad."}
OLD_PAIR = {"chosen": old("A: Good.")[0], "rejected": old("A: Bad.")[0]}
WHOLE = {"chosen": new("U: Hi? | A: Good."), "rejected": new("U: Hi? | A: Bad.")}
TURNS = {"prompt": new("U: Hi?"), "chosen": new("A: Good."), "rejected": new("A: Bad.")}
SEVERAL = "U: Hi? | A: Yes. | U: Hi?"
PARTS = {"prompt": new("U: Hi?"), "completion": new("A: Good.")}
# A row with the answers "Good." and "Bad.", or with "Good." alone; its prompt, and the rating.
PREFERRED = [
    ({"prompt": "Hi?"} | TEXT, "U: Hi?", None),
    ({"system": "Be brief.", "prompt": "Hi?"} | TEXT, "S: Be brief. | U: Hi?", None),
    ({"instruction": "Hi?", "input": ""} | TEXT, "U: Hi?", None),
    (TURNS, "U: Hi?", None),
    (WHOLE, "U: Hi?", None),
    ({"prompt": "Hi?"} | WHOLE, "U: Hi?", None),
    ({"conversations": old("U: Hi?")} | OLD_PAIR, "U: Hi?", None),
    ({"conversations": old(SEVERAL)} | OLD_PAIR, SEVERAL, None),
    ({"prompt": "Hi?"} | OLD_PAIR | {"rejected": new("A: Bad.")[0]}, "U: Hi?", None),
    ({"conversations": old("U: Hi?")} | TURNS | {"chosen": old("A: Good.")}, "U: Hi?", None),
    ({"prompt": "Hi?"} | WHOLE | {"rejected": new("U: Hi? | A: Bad. | U: More?")}, "U: Hi?", None),
    ({"prompt": "Hi?", "completion": "Good.", "label": True}, "U: Hi?", True),
    ({"prompt": "Hi?", "response": "Good.", "label": 0}, "U: Hi?", False),
    (PARTS | {"label": True}, "U: Hi?", True),
    ({"messages": new("U: Hi? | A: Good."), "label": False}, "U: Hi?", False),
    ({"messages": new("U: Hi? | A: Good. | U: More?"), "label": True}, "U: Hi?", True),
    ({"conversations": old("U: Hi? | A: Good."), "kto_tag": True}, "U: Hi?", True),
]


@pytest.mark.parametrize(("row", "prompt", "rating"), PREFERRED)
def test_preferences_of_all_formats_are_the_same(row, prompt, rating):
    convert = PREFERENCES[require_columns("dpo" if rating is None else "kto", row)]
    good, bad = new("A: Good."), new("A: Bad.")
    expected = Preference(new(prompt), (good, bad) if rating is None else (good,), rating)
    assert (list(convert(row)), expected.is_equal) == ([expected], False)
    if rating is None:
        [same] = convert(json.loads(json.dumps(row).replace("Bad.", "Good.")))
        assert same == Preference(new(prompt), (good, good))
        assert (same.is_equal, same.has_answer) == (True, True)


# The format or the objective, the columns, and the message.
UNFIT = [
    (None, ["body", "title"], r"got body, title; known are messages \(messages\); .*`--format`"),
    (None, ["prompt", "chosen", "rejected"], "got preference data"),
    ("alpaca", ["instruction", "x"], "'alpaca' needs.*; output missing from instruction, x"),
    ("prompt-completion", ["prompt"], "; completion missing from prompt"),
    ("dpo", ["prompt", "completion"], r"dpo needs the columns chosen\+rejected"),
    ("reward", ["messages", "label"], r"these are rated .*: choose `--objective` kto"),
    ("kto", ["prompt", "chosen", "rejected"], r"label .* are pairs: choose .* dpo"),
    ("kto", ["label", "text"], r"got label, text; rename the columns"),
    ("dpo", {"chosen": "a", "rejected": "b"}, "A pair must have a prompt, got only `chosen` and"),
]


@pytest.mark.parametrize(("wanted", "columns", "message"), UNFIT)
def test_columns_that_do_not_fit_are_refused_with_what_would(wanted, columns, message):
    row = columns if isinstance(columns, dict) else dict.fromkeys(columns)
    with pytest.raises(ValueError, match=message):
        require_columns(wanted, row) if wanted in FORMAT_OF else read_format(row, wanted)


CALL = {"role": "assistant", "content": "a"}
PART = {"role": "user", "content": [{"type": "image", "text": None}]}
QUESTION = {"instruction": "q", "output": "a"}
MINE, THEIRS = new("A: a"), new("U: a")


def pair(chosen, rejected):
    return {"prompt": "q", "chosen": chosen, "rejected": rejected}


# The format, the cells, and the message.
REFUSED = [
    ("sharegpt", {"conversations": [{"from": "narrator"}]}, "one of system.*got 'narrator'; rena"),
    ("messages", {"messages": [PART]}, "`content` must be text, got a part of type 'image'"),
    ("messages", {"messages": new("A: a"), "tools": "["}, r"`tools` must be JSON, got '\['"),
    ("messages", {"messages": [CALL | {"tool_calls": ["f"]}]}, "must have a name and arguments"),
    ("messages", {"messages": [CALL | {"tool_calls": [{"id": 1}]}]}, "a name and arguments"),
    ("messages", {"messages": [CALL | {"weight": 0.5}]}, "`weight` must be true or false, got 0.5"),
    ("messages", {"messages": [CALL | {"train_detail": [1]}]}, "whole or not at all, got 'train_d"),
    ("messages", {"messages": ["hi"]}, r"content \(or from and value\), got 'hi'; rewrite"),
    ("messages", {"messages": "hello"}, "`messages` must be a list of turns, got 'hello'"),
    ("lima", {"conversations": "q"}, "`conversations` must be a list of texts, got 'q'"),
    ("text", {"text": 1.5}, "`text` must be text, got float"),
    ("text", {"text": True}, "`text` must be text, got bool"),
    ("alpaca", QUESTION | {"history": ["x"]}, r"a list of \[question, answer\], got \['x'\]"),
    ("self-instruct", {"instruction": "q", "instances": ["x"]}, "must be a list of input and outp"),
    ("rated", {"prompt": "q", "completion": "a", "label": "yes"}, "must be true or false"),
    ("rated", {"prompt": "q", "completion": "a", "label": 3}, "must be true or false, got 3"),
    ("rated", {"prompt": "q", "completion": "a", "label": None}, "must be true or false, got null"),
    ("rated", {"prompt": "q", "completion": new("U: a"), "label": 1}, "`completion` .* 'user'"),
    ("pairs", pair(1.5, "b"), "`chosen` must be text"),
    ("pairs", pair("a", "b") | {"prompt": [{"role": "x"}]}, "got 'x'"),
    ("pairs", pair(MINE, THEIRS), "`rejected` must hold an answer of the .* a turn of role 'user'"),
    ("pairs", pair(THEIRS, MINE), "`chosen` must hold an answer of the .* a turn of role 'user'"),
    ("pairs", pair(THEIRS, THEIRS), "`chosen` must hold an answer"),
    ("pairs", pair(THEIRS[0], MINE[0]), "`chosen` must hold an answer"),
    ("pairs", pair(MINE, new("U: q | A: b")), "`rejected` must begin with a turn .* 'user'"),
    ("pairs", pair(new("U: q | A: b"), new("U: r | A: b")), "`chosen` must begin with a turn of"),
]


@pytest.mark.parametrize(("format", "row", "message"), REFUSED)
def test_what_cannot_be_trained_is_refused_in_one_line(format, row, message):
    convert = PREFERENCES[format] if format in PREFERENCES else FORMATS[format][1]
    with pytest.raises(DataError, match=f"^Row 1: .*{message}") as caught:
        convert_rows([row], format, convert)
    assert "\n" not in str(caught.value)


@given(st.lists(st.tuples(st.sampled_from("SUA"), st.text()), max_size=6))
def test_spellings_agree_and_every_conversation_ends_with_an_answer(turns):
    messages = [{"role": ROLES[role], "content": text} for role, text in turns]
    sharegpt = [{"from": HUMAN[role], "value": text} for role, text in turns]
    [found] = FORMATS["messages"][1]({"messages": messages})
    assert [found] == list(FORMATS["sharegpt"][1]({"conversations": sharegpt}))
    answered = [role == "A" and bool(text.strip()) for role, text in turns]
    length = max((end for end, is_answer in enumerate(answered, 1) if is_answer), default=0)
    empty = {"weight": 0}
    expected = [
        turn | (empty if role == "A" and not is_answer else {})
        for turn, (role, _), is_answer in zip(messages, turns, answered, strict=True)
    ]
    assert found.messages == expected[:length]
    assert found.num_empty == sum("weight" in turn for turn in expected)
