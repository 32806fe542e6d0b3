# SPDX-License-Identifier: Apache-2.0
"""What a turn says next to its text: marks of what is learned, other fields, calls of tools."""

import json

import pytest

from keylayers.data.formats import Conversation, conversations_of
from keylayers.errors import DataError
from test_formats import new, old, read


def answers(**marks):
    """A question, an answer with the marks, and an answer without."""
    turns = new("U: q | A: a | U: r | A: b")
    turns[1] |= marks
    return turns


def says(value):
    return value not in ("0", "false", "False") and bool(value)


MARKS = [
    *(dict.fromkeys([name], 0) for name in ("weight", "loss", "loss_mask", "trainable", "learn")),
    *({name: False} for name in ("weight", "train", "training", "train_on_turn", "loss")),
    *({name: value} for name in ("masked", "mask") for value in (True, 1)),
    *({"weight": value} for value in (0.0, "0", "false", "False")),
    {"weight": None, "masked": True},
]


@pytest.mark.parametrize("marks", MARKS, ids=str)
def test_a_turn_that_is_marked_as_not_to_be_learned_has_weight_0_whatever_the_spelling(marks):
    opposite = {name: None if value is None else not says(value) for name, value in marks.items()}
    for turns, weights in ((answers(**marks), [0, None]), (answers(**opposite), [None, None])):
        for column in ("messages", "conversations"):
            [found] = conversations_of({column: turns}, "messages", is_forced=False)
            assert [turn.get("weight") for turn in found.messages[1::2]] == weights
            assert not set(marks) & set(found.messages[1]) - {"weight"}
            assert (found.num_masked, found.num_empty) == (weights.count(0), 0)


def test_a_conversation_ends_with_its_last_answer_to_learn():
    turns = answers(weight=1)
    turns[3]["weight"] = 0
    [found] = conversations_of({"messages": turns}, "messages", is_forced=False)
    assert (found.messages, found.num_masked) == (new("U: q | A: a"), 1)
    turns[1]["train"] = False  # next to `weight` 1
    [found] = conversations_of({"messages": turns}, "messages", is_forced=False)
    assert (found.has_answer, found.num_masked) == (False, 2)


def test_empty_answers_inside_a_conversation_are_kept_counted_and_not_learned():
    texts = ("", " \n", None, [])
    for text in texts:
        [found] = conversations_of({"messages": answers(content=text)}, "messages", is_forced=False)
        assert (found.num_empty, found.num_masked, len(found.messages)) == (1, 0, 4)
        assert [turn.get("weight") for turn in found.messages] == [None, 0, None, None]
    rows = (
        {"conversations": ["q", "", "r", "b"]},
        {"instruction": "r", "output": "b", "history": [["q", ""]]},
        {"conversations": [turn | {"content": turn["content"].strip("a")} for turn in answers()]},
    )
    for row in rows:
        _, [messages], _ = read(row)
        assert messages == [
            *new("U: q"),
            {"role": "assistant", "content": "", "weight": 0},
            *new("U: r | A: b"),
        ]


CALLED = {"function": {"name": "f", "arguments": {"x": 1}}, "type": "function"}
# Fields of an answer, and what the template gets of them.
FIELDS = [
    ({"reasoning_content": "so", "name": None}, {"reasoning_content": "so"}),
    (
        {"thinking": "so", "own": {"a": None, "b": [{"c": None}]}},
        {"thinking": "so", "own": {"b": [{}]}},
    ),
    ({"tool_calls": [CALLED]}, {"tool_calls": [CALLED]}),
    ({"tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]}, {"tool_calls": [CALLED]}),
    ({"function_call": {"name": "f", "arguments": '{"x": 1}'}}, {"tool_calls": [CALLED]}),
    ({"tool_calls": [], "function_call": None}, {}),
]


@pytest.mark.parametrize(("fields", "expected"), FIELDS)
def test_every_other_field_of_a_turn_is_handed_on_without_nulls(fields, expected):
    question, answer = new("U: q | A: a")
    for row in (
        {"messages": [question, answer | fields]},
        {"prompt": "q", "completion": [answer | fields]},
    ):
        assert read(row)[1] == [[question, answer | expected]]
    plain, other = (Conversation(turns) for turns in ([answer], [answer | {"name": "x"}]))
    assert plain.digest() != other.digest()


def test_fields_that_are_nested_too_deep_are_refused():
    deep = "a"
    for _ in range(400):
        deep = [{"a": deep}]
    with pytest.raises(DataError, match=r"^Row 1: its fields are nested too deep"):
        read({"messages": [*new("U: q"), *new("A: a"), {"role": "user", "own": deep}]})


def test_a_call_of_a_tool_is_an_answer_without_words():
    """As OpenAI and as LLaMA-Factory spell it; the turns of tools have a role of their own."""
    call = {"role": "assistant", "content": "", "tool_calls": [CALLED]}
    expected = [*new("U: q"), call, {"role": "tool", "content": "1"}, *new("A: a")]
    spoken = [
        *old("U: q"),
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "1"},
        *old("A: a"),
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    for turns in (
        expected,
        spoken,
        [turn | {"content": turn["content"] or None} for turn in expected],
    ):
        column = "conversations" if turns is spoken else "messages"
        for cell in (tools, json.dumps(tools), [json.dumps(tools[0])]):
            [found] = conversations_of({column: turns, "tools": cell}, "messages", is_forced=False)
            assert (found.messages, found.tools) == (expected, tools)
        assert read({column: turns[:2]})[1] == [expected[:2]]
    for nothing in (None, "", [], "[]"):
        [found] = conversations_of(
            {"messages": expected, "tools": nothing}, "messages", is_forced=True
        )
        assert found.tools is None
