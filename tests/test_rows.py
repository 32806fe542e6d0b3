# SPDX-License-Identifier: Apache-2.0
"""What rows say beside question and answer: marks, ratings, other fields, nulls."""

import pytest

from keylayers.errors import DataError
from prepared import PAIRS, RATED, ROWS, TOKENIZER, prepare, texts, write

TALK = [{"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "It is 1."}]


def learned(examples):
    """The text that the loss counts in each example."""
    counted = ([label for label in each["labels"] if label != -100] for each in examples)
    return [TOKENIZER.decode(labels) for labels in counted]


def test_answers_that_are_empty_or_marked_are_read_and_not_learned(tmp_path):
    def row(number, first):
        asked = {"role": "user", "content": f"Say {number}."}
        return {"messages": [asked, first, asked, {"role": "assistant", "content": "Good."}]}

    marked = {"role": "assistant", "content": "Bad.", "weight": 0}
    silent = {"role": "assistant", "content": ""}
    rows = [row(i, marked if i % 2 else silent) for i in range(10)]
    found = prepare(write(tmp_path / "a.jsonl", rows), held_out=2.0)
    assert learned(found.train) == 8 * ["Good.</s>"]
    assert learned(found.held_out) == 2 * ["Good.</s>"]
    assert sum("Bad." in text for text in texts(found.train) + texts(found.held_out)) == 5
    assert (found.counts.num_empty_answers, found.counts.num_masked_answers) == (5, 5)
    expected = "answers that the loss leaves out: 5 empty, 5 marked as not to be learned"
    assert expected in found.summary()


# Labels of rows, and whether they are ratings.
LABELS = [
    *(
        (labels, True)
        for labels in ([None, True, False], [0, 1, 1], [None, 1, 1], ["True", "false"])
    ),
    *(
        (labels, False)
        for labels in ([0, 1, 2], ["dog", "cat"], [0.5, 1.0], [None, None], [[0], [1]])
    ),
]


@pytest.mark.parametrize(("labels", "is_rating"), LABELS, ids=str)
@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_rated_answers_are_not_taken_for_answers_to_imitate(tmp_path, column, labels, is_rating):
    rows = [row | {column: labels[i % len(labels)]} for i, row in enumerate(ROWS)]
    path = write(tmp_path / "a.jsonl", rows)
    assert prepare(path, format="alpaca").counts.num_examples == 20
    if not is_rating:
        found = prepare(path)
        assert any(f"columns {column}" in line for line in found.summary()) is any(
            label is not None for label in labels
        )
        return
    with pytest.raises(DataError, match=f"got preference data .*; {column} rates them"):
        prepare(path)
    rated = [row | {column: labels[i % len(labels)]} for i, row in enumerate(RATED)]
    rated = [{key: row[key] for key in ("prompt", "completion", column)} for row in rated]
    given = [row for row in rated if row[column] is not None]
    if len({str(row[column]) for row in given}) == 2:
        assert prepare(write(path, given), objective="kto").counts.num_examples == len(given)


def test_what_nothing_uses_is_named_once(tmp_path):
    first = [TALK[0], TALK[1] | {"reasoning_content": "1", "note": "x"}]
    rows = [
        {"messages": first, "images": ["a.jpg"], "tools": '[{"name": "f"}]', "id": None},
        *({"messages": [{"role": "user", "content": f"Say {i}."}, TALK[1]]} for i in range(9)),
    ]
    path = write(tmp_path / "a.jsonl", rows)
    lines = [line for line in prepare(path).summary() if "not used" in line]
    assert lines == [
        "not used: columns images",
        "not used: fields of turns reasoning_content, note, which the chat template does not use",
        "not used: tools, which the chat template does not use",
    ]
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content }}{{ tools }}{{ m['note'] }}{{ m.reasoning_content }}"
        "{% endfor %}"
    )
    found = prepare(path, chat_template=str(template))
    assert [line for line in found.summary() if "not used" in line] == ["not used: columns images"]
    plain = prepare(write(path, [{"text": f"a {i}", "label": i % 2} for i in range(3)]))
    assert plain.unused == ("columns label",)  # the class of the text, as in IMDb


def test_equal_pairs_are_left_out_and_counted(tmp_path):
    rows = [*PAIRS, *({"prompt": f"More {i}?", "chosen": "A.", "rejected": "A."} for i in range(3))]
    found = prepare(write(tmp_path / "a.jsonl", rows), objective="dpo")
    assert (found.counts.num_equal_pairs, found.counts.num_examples) == (3, 20)
    assert "of the data: 3 pairs of equal answers" in found.summary()


def test_fields_of_preferences_reach_the_trainer_without_nulls(tmp_path):
    def answer(text, **fields):
        return [{"role": "assistant", "content": text, **fields}]

    rows = [
        row | {"chosen": answer("Good.", thinking="x", weight=1), "rejected": answer("Bad.")}
        for row in PAIRS
    ]
    found = prepare(write(tmp_path / "a.jsonl", rows), objective="dpo")
    row = found.train[0]
    assert (row["chosen"], row["rejected"]) == (answer("Good.", thinking="x"), answer("Bad."))


def test_a_column_may_be_null_in_the_first_rows(tmp_path):
    """As in joined data sets: the format is that of the columns that hold something."""
    joined = [
        *({"messages": None, "conversations": ["Say 1.", f"It is {i}."]} for i in range(4)),
        *({"messages": TALK, "conversations": None, "label": None} for _ in range(2)),
    ]
    found = prepare(write(tmp_path / "a.jsonl", joined), held_out=1.0)
    assert (found.counts.num_examples, found.counts.num_dropped_empty) == (4, 0)
    assert found.counts.num_duplicates == 2
