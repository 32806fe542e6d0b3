# SPDX-License-Identifier: Apache-2.0
"""Preference data in the formats that people have it in, and how it is split and counted."""

import json

import pytest

from tiny_files import tiny_tokenizer

TURN = {"role": "user", "content": "Hi?"}
GOOD = {"role": "assistant", "content": "Good."}
BAD = {"role": "assistant", "content": "Bad."}
OLD = [{"from": "human", "value": "Hi?"}]
PLAIN = ([("user", "Hi?")], [("assistant", "Good.")], [("assistant", "Bad.")])
WITH_SYSTEM = ([("system", "Be brief."), *PLAIN[0]], *PLAIN[1:])
LONGER = ([("user", "Hi?"), ("assistant", "Yes."), ("user", "Hi?")], *PLAIN[1:])

PAIRS = {
    "text": ({"prompt": "Hi?", "chosen": "Good.", "rejected": "Bad."}, PLAIN),
    "text with a system column": (
        {"system": "Be brief.", "prompt": "Hi?", "chosen": "Good.", "rejected": "Bad."},
        WITH_SYSTEM,
    ),
    "messages": ({"prompt": [TURN], "chosen": [GOOD], "rejected": [BAD]}, PLAIN),
    "whole conversations": ({"chosen": [TURN, GOOD], "rejected": [TURN, BAD]}, PLAIN),
    "whole conversations beside a prompt": (
        {"prompt": "Hi?", "chosen": [TURN, GOOD], "rejected": [TURN, BAD]},
        PLAIN,
    ),
    "ShareGPT pairs": (
        {
            "conversations": OLD,
            "chosen": {"from": "gpt", "value": "Good."},
            "rejected": {"from": "gpt", "value": "Bad."},
        },
        PLAIN,
    ),
    "several turns": (
        {
            "conversations": [*OLD, {"from": "gpt", "value": "Yes."}, *OLD],
            "chosen": {"from": "gpt", "value": "Good."},
            "rejected": {"from": "gpt", "value": "Bad."},
        },
        LONGER,
    ),
    "instruction": (
        {"instruction": "Hi?", "input": "", "chosen": "Good.", "rejected": "Bad."},
        PLAIN,
    ),
}
RATED = {
    "text": ({"prompt": "Hi?", "completion": "Good.", "label": True}, True),
    "messages": ({"messages": [TURN, GOOD], "label": False}, False),
    "prompt and completion as messages": (
        {"prompt": [TURN], "completion": [GOOD], "label": True},
        True,
    ),
    "ShareGPT": (
        {"conversations": [*OLD, {"from": "gpt", "value": "Good."}], "kto_tag": True},
        True,
    ),
    "numbers": ({"prompt": "Hi?", "response": "Good.", "label": 0}, False),
    "turns after the answer": ({"messages": [TURN, GOOD, TURN], "label": True}, True),
}


def turns(messages):
    return [(one.role, one.content) for one in messages]


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_all_formats_are_the_same_pairs(name):
    from keylayers.data.preferences import preferences, require_preferences

    row, (prompt, chosen, rejected) = PAIRS[name]
    require_preferences("pairs", "dpo", list(row))
    [found], num_dropped = preferences([row], "pairs")
    assert turns(found.prompt) == prompt
    assert [turns(answer) for answer in found.answers] == [chosen, rejected]
    assert num_dropped == 0


@pytest.mark.parametrize("name", RATED)
def test_rated_answers_of_all_formats_are_the_same(name):
    from keylayers.data.preferences import preferences, require_preferences

    row, label = RATED[name]
    require_preferences("rated", "kto", list(row))
    [found], _ = preferences([row], "rated")
    assert (turns(found.prompt), [turns(answer) for answer in found.answers]) == (
        PLAIN[0],
        [PLAIN[1]],
    )
    assert found.is_good is label


@pytest.mark.parametrize(
    ("format", "objective", "columns", "message"),
    [
        ("pairs", "dpo", ["prompt", "completion"], r"dpo needs the columns chosen\+rejected"),
        ("pairs", "reward", ["messages", "label"], r"these are rated .*: choose `--objective` kto"),
        ("rated", "kto", ["prompt", "chosen", "rejected"], r"label .* are pairs: choose .* dpo"),
        ("rated", "kto", ["label", "text"], r"got label, text; rename the columns"),
    ],
)
def test_columns_for_another_objective_are_refused_with_what_is_needed(
    format, objective, columns, message
):
    from keylayers.data.preferences import require_preferences
    from keylayers.errors import DataError

    with pytest.raises(DataError, match=message):
        require_preferences(format, objective, columns)


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("rated", {"prompt": "q", "completion": "a", "label": "yes"}, "must be true or false"),
        ("rated", {"prompt": "q", "completion": "a", "label": 3}, "must be true or false, got 3"),
        ("pairs", {"chosen": "a", "rejected": "b"}, "A pair must have a prompt"),
        ("pairs", {"prompt": "q", "chosen": 1.5, "rejected": "b"}, "`chosen` must be text"),
        ("pairs", {"prompt": [{"role": "x"}], "chosen": "a", "rejected": "b"}, "'x' in row 1"),
    ],
)
def test_rows_that_cannot_be_read_are_named(format, row, message):
    from keylayers.data.preferences import preferences
    from keylayers.errors import DataError

    with pytest.raises(DataError, match=message):
        preferences([row], format)


def test_rows_without_a_prompt_or_an_answer_are_dropped_and_counted():
    from keylayers.data.preferences import preferences

    rows = [
        {"prompt": "Hi?", "chosen": "Good.", "rejected": " "},
        {"prompt": "", "chosen": "Good.", "rejected": "Bad."},
        {"prompt": "Hi?", "chosen": "Good.", "rejected": "Bad."},
    ]
    found, num_dropped = preferences(rows, "pairs")
    assert (len(found), num_dropped) == (1, 2)


def prepared(tmp_path, rows, objective, **options):
    from keylayers.data.options import DataOptions
    from keylayers.data.prepare import prepare

    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    max_positions = options.pop("max_positions", 64)
    settings = DataOptions(data=str(path), **options)
    return prepare(settings, tiny_tokenizer(), max_positions, objective)


def many(kind, count=20):
    rows = [
        {"prompt": f"Hi {index}?", "chosen": "Good.", "rejected": "Bad."} for index in range(count)
    ]
    if kind == "pairs":
        return rows
    labels = enumerate(rows)
    return [
        {"prompt": row["prompt"], "completion": "Good.", "label": i % 2 == 0} for i, row in labels
    ]


@pytest.mark.parametrize(("objective", "kind"), [("dpo", "pairs"), ("kto", "rated")])
def test_three_splits_that_never_mix(tmp_path, objective, kind):
    data = prepared(tmp_path, [*many(kind), *many(kind, 3)], objective)
    assert (data.counts.num_train, data.counts.num_mask, data.counts.num_held_out) == (16, 2, 2)
    assert data.counts.num_duplicates == 3
    sets = [{str(row["prompt"]) for row in one} for one in (data.train, data.mask, data.held_out)]
    assert len(set().union(*sets)) == 20
    again = prepared(tmp_path, many(kind)[::-1], objective)
    assert {str(row["prompt"]) for row in again.held_out} == sets[2]
    other = prepared(tmp_path, many(kind), objective, split_seed=1)
    assert {str(row["prompt"]) for row in other.held_out} != sets[2]
    assert again.content_sha256 != data.content_sha256  # another order
    assert data.format == kind
    answers = ["chosen", "rejected"] if kind == "pairs" else ["completion", "label"]
    assert data.train.column_names == ["prompt", *answers]
    assert "16 examples to train, 2 for the mask and 2 held out" in data.summary()[0]


def test_what_a_trainer_would_empty_is_left_out_and_what_it_cuts_is_counted(tmp_path):
    long = " ".join(["honey"] * 80)
    rows = [*many("pairs"), {"prompt": long, "chosen": "Good.", "rejected": "Bad."}]
    rows += [{"prompt": "Hi?", "chosen": long, "rejected": "Bad."}]
    counts = prepared(tmp_path, rows, "dpo").counts
    assert (counts.num_truncated_away, counts.num_truncated) == (1, 1)
    counts = prepared(tmp_path, rows, "reward").counts
    assert (counts.num_truncated_away, counts.num_truncated) == (2, 0)


def test_the_tokens_of_the_answers_are_counted_as_the_trainer_cuts_them(tmp_path):
    counts = prepared(tmp_path, many("pairs", 10), "dpo", held_out=1.0).counts
    tokenizer = tiny_tokenizer()
    answers = [len(tokenizer(f"{text}</s>")["input_ids"]) for text in ("Good.", "Bad.")]
    assert counts.num_label_tokens == 8 * sum(answers)


@pytest.mark.parametrize(
    ("kind", "objective", "options", "message"),
    [
        ("pairs", "dpo", {"format": "alpaca"}, "`format` must be left out with `objective` dpo"),
        ("pairs", "dpo", {"max_positions": 4}, "must leave room for an answer in 4 tokens"),
        ("good", "kto", {}, "Rated answers must be good and bad"),
        ("pairs", "sft", {}, "choose an objective for preferences with `--objective`"),
    ],
)
def test_data_and_options_that_do_not_fit_the_objective_are_refused(
    tmp_path, kind, objective, options, message
):
    from keylayers.errors import KeylayersError

    rows = [{**row, "label": True} for row in many("rated")] if kind == "good" else many(kind)
    with pytest.raises(KeylayersError, match=message):
        prepared(tmp_path, rows, objective, **options)


def test_csv_and_parquet_are_read_too(tmp_path):
    from datasets import Dataset

    from keylayers.data.options import DataOptions
    from keylayers.data.prepare import prepare

    for kind, objective in (("pairs", "dpo"), ("rated", "kto")):
        table = Dataset.from_list(many(kind))
        table.to_csv(str(tmp_path / "a.csv"), index=False)
        table.to_parquet(str(tmp_path / "a.parquet"))
        expected = prepared(tmp_path, many(kind), objective).content_sha256
        for name in ("a.csv", "a.parquet"):
            options = DataOptions(data=str(tmp_path / name))
            assert prepare(options, tiny_tokenizer(), 64, objective).content_sha256 == expected
