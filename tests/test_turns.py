# SPDX-License-Identifier: Apache-2.0
"""What rows and turns say next to question and answer: marks, ratings, other fields, calls."""

import json

import pytest

from keylayers.data.formats import conversations_of
from keylayers.errors import DataError
from prepared import PAIRS, RATED, ROWS, learned, numbers, prepare, texts, write
from test_formats import new, old, read


def answers(**marks):
    """A question, an answer with the marks, and an answer without."""
    turns = new("U: q | A: a | U: r | A: b")
    turns[1] |= marks
    return turns


def conversation(**row):
    [found] = conversations_of(row, "messages", is_forced=False)
    return found


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
            found = conversation(**{column: turns})
            assert [turn.get("weight") for turn in found.messages[1::2]] == weights
            assert not set(marks) & set(found.messages[1]) - {"weight"}
            assert (found.num_masked, found.num_empty) == (weights.count(0), 0)


def test_a_conversation_ends_with_its_last_answer_to_learn():
    turns = answers(weight=1)
    turns[3]["weight"] = 0
    found = conversation(messages=turns)
    assert (found.messages, found.num_masked) == (new("U: q | A: a"), 1)
    turns[1]["train"] = False  # next to `weight` 1
    found = conversation(messages=turns)
    assert (found.has_answer, found.num_masked) == (False, 2)


def test_empty_answers_inside_a_conversation_are_kept_counted_and_not_learned():
    for text in ("", " \n", None, []):
        found = conversation(messages=answers(content=text))
        assert (found.num_empty, found.num_masked, len(found.messages)) == (1, 0, 4)
        assert [turn.get("weight") for turn in found.messages] == [None, 0, None, None]
    rows = (
        {"conversations": ["q", "", "r", "b"]},
        {"instruction": "r", "output": "b", "history": [["q", ""]]},
        {"conversations": [turn | {"content": turn["content"].strip("a")} for turn in answers()]},
    )
    for row in rows:
        _, [messages], _ = read(row)
        assert messages == answers(content="", weight=0)


CALLED = {"function": {"name": "f", "arguments": {"x": 1}}, "type": "function"}
# Fields of an answer, and what the template gets of them.
FIELDS = [
    ({"reasoning_content": "so", "name": None}, {"reasoning_content": "so"}),
    (
        {"thinking": "", "own": {"a": None, "b": [{"c": None}]}},
        {"thinking": "", "own": {"b": [{}]}},
    ),
    ({"tool_calls": [CALLED]}, {"tool_calls": [CALLED]}),
    ({"tool_calls": [{"name": "f", "arguments": '{"x": 1}'}]}, {"tool_calls": [CALLED]}),
    ({"function_call": {"name": "f", "arguments": '{"x": 1}'}}, {"tool_calls": [CALLED]}),
    ({"tool_calls": [], "function_call": None}, {}),
]


@pytest.mark.parametrize(("fields", "expected"), FIELDS)
def test_every_other_field_of_a_turn_is_handed_on_without_nulls(fields, expected):
    question, answer = new("U: q | A: a")
    answered = [answer | fields]
    for row in ({"messages": [question, *answered]}, {"prompt": "q", "completion": answered}):
        assert read(row)[1] == [[question, answer | expected]]


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
    null = [turn | {"content": turn["content"] or None} for turn in expected]
    for turns in (expected, spoken, null):
        column = "conversations" if turns is spoken else "messages"
        for cell in (tools, json.dumps(tools), [json.dumps(tools[0])]):
            found = conversation(**{column: turns}, tools=cell)
            assert (found.messages, found.tools) == (expected, tools)
        assert read({column: turns[:2]})[1] == [expected[:2]]
    for nothing in (None, "", [], "[]"):
        assert conversation(messages=expected, tools=nothing).tools is None


def test_answers_that_are_empty_or_marked_are_read_and_not_learned(tmp_path):
    talks = [new(f"U: Say {i}. | A:  | U: Say {i}. | A: Good.") for i in range(10)]
    for turns in talks[::2]:
        turns[1] |= {"content": "Bad.", "weight": 0}
    rows = [{"messages": turns} for turns in talks]
    found = prepare(write(tmp_path / "a.jsonl", rows), held_out=2.0)
    assert [learned(row) for row in (*found.train, *found.held_out)] == 10 * ["Good.</s>"]
    assert sum("Bad." in text for text in texts(found.train) + texts(found.held_out)) == 5
    assert (found.counts.num_empty_answers, found.counts.num_masked_answers) == (5, 5)
    expected = "answers that the loss leaves out: 5 empty, 5 marked as not to be learned"
    assert expected in found.summary()


RATINGS = [[None, True, False], [0, 1, 1], [None, 1, 1], [1.0, 0.0], ["True", "false"], ["1", "0"]]
RATINGS += [["true", "False"]]
OTHER_LABELS = [[0, 1, 2], ["dog", "cat"], [0.5, 1.0], [None, None], [[0], [1]]]


def labelled(path, column, labels, rows):
    return write(path, [row | {column: labels[i % len(labels)]} for i, row in enumerate(rows)])


@pytest.mark.parametrize("labels", RATINGS, ids=str)
@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_rated_answers_are_not_taken_for_answers_to_imitate(tmp_path, column, labels):
    path = labelled(tmp_path / "a.jsonl", column, labels, ROWS)
    assert prepare(path, format="alpaca").counts.num_examples == 20
    with pytest.raises(DataError, match=f"got preference data .*; {column} rates them"):
        prepare(path)
    given = [label for label in labels if label is not None]
    rows = [row | {"label": None, "kto_tag": None} for row in RATED]
    if len({str(label) for label in given}) == 2:
        found = prepare(labelled(path, column, given, rows), objective="kto", held_out=1.0)
        is_good = [str(label).lower() in ("true", "1", "1.0") for label in given]
        said = zip(numbers(found.train), found.train["label"], strict=True)
        assert all(label == is_good[number % len(given)] for number, label in said)
        assert found.counts.num_examples == 20


@pytest.mark.parametrize("labels", OTHER_LABELS, ids=str)
@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_labels_that_rate_nothing_are_not_used(tmp_path, column, labels):
    found = prepare(labelled(tmp_path / "a.jsonl", column, labels, ROWS))
    assert found.unused == (() if labels == [None, None] else (f"columns {column}",))


def test_what_nothing_uses_is_named_once(tmp_path):
    talks = [new(f"U: Say {i}. | A: It is {i}.") for i in range(10)]
    talks[0][1] |= {"reasoning_content": "1", "note": "x"}
    others = {"images": ["a.jpg"], "tools": '[{"name": "f"}]', "id": 0, "audios": [], "x": None}
    rows = [{"messages": turns} | (others if turns is talks[0] else {}) for turns in talks]
    path = write(tmp_path / "a.jsonl", rows)
    assert prepare(path).summary()[1:] == [
        "not used: columns images, id",
        "not used: fields of turns reasoning_content, note, which the chat template does not use",
        "not used: tools, which the chat template does not use",
    ]
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content }}{{ tools }}{{ m['note'] }}{{ m.reasoning_content }}"
        "{% endfor %}"
    )
    assert prepare(path, chat_template=str(template)).unused == ("columns images, id",)
    plain = prepare(write(path, [{"text": f"a {i}", "label": i % 2} for i in range(3)]))
    assert plain.unused == ("columns label",)  # the class of the text, as in IMDb


def test_equal_pairs_and_columns_of_pairs_that_nothing_uses_are_named(tmp_path):
    equal = [{"prompt": f"More {i}?", "chosen": "A.", "rejected": "A."} for i in range(3)]
    rows = [row | {"images": ["a.jpg"], "system": "s"} for row in [*PAIRS, *equal]]
    found = prepare(write(tmp_path / "a.jsonl", rows), objective="dpo")
    assert (found.counts.num_equal_pairs, found.counts.num_examples) == (3, 20)
    assert found.summary()[1:] == [
        "not used: columns images",
        "of the data: 3 pairs of equal answers",
    ]


def test_fields_of_preferences_reach_the_trainer_without_nulls(tmp_path):
    [good], [bad] = new("A: Good."), new("A: Bad.")
    answers = {"chosen": [good | {"thinking": "x", "weight": 1}], "rejected": [bad]}
    path = write(tmp_path / "a.jsonl", [row | answers for row in PAIRS])
    row = prepare(path, objective="dpo").train[0]
    assert (row["chosen"], row["rejected"]) == ([good | {"thinking": "x"}], [bad])


def test_a_column_may_be_null_in_the_first_rows(tmp_path):
    """As in joined data sets: the format is that of the columns that hold something."""
    talk = new("U: Say 1. | A: It is 1.")
    joined = [
        *({"messages": None, "conversations": ["Say 1.", f"It is {i}."]} for i in range(4)),
        *({"messages": talk, "conversations": None, "label": None} for _ in range(2)),
    ]
    found = prepare(write(tmp_path / "a.jsonl", joined), held_out=1.0)
    assert (found.counts.num_examples, found.counts.num_dropped_empty) == (4, 0)
    assert found.counts.num_duplicates == 2
