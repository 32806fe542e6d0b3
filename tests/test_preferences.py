# SPDX-License-Identifier: Apache-2.0
"""Preference data in the formats that people have it in, and how it is split and counted."""

import json

import pytest

from tiny_files import tiny_tokenizer

TURN = {"role": "user", "content": "Hi?"}
GOOD = {"role": "assistant", "content": "Good."}
BAD = {"role": "assistant", "content": "Bad."}
OLD, OLD_YES = {"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Yes."}
OLD_GOOD, OLD_BAD = {"from": "gpt", "value": "Good."}, {"from": "gpt", "value": "Bad."}
ASKED = [("user", "Hi?")]
WITH_SYSTEM = [("system", "Be brief."), *ASKED]
SEVERAL = [*ASKED, ("assistant", "Yes."), *ASKED]
TEXT = {"chosen": "Good.", "rejected": "Bad."}
OLD_PAIR = {"chosen": OLD_GOOD, "rejected": OLD_BAD}
WHOLE = {"chosen": [TURN, GOOD], "rejected": [TURN, BAD]}
# A row, and the prompt in it; the answers are "Good." and "Bad.".
PAIRS = {
    "text": ({"prompt": "Hi?"} | TEXT, ASKED),
    "text with a system column": ({"system": "Be brief.", "prompt": "Hi?"} | TEXT, WITH_SYSTEM),
    "messages": ({"prompt": [TURN], "chosen": [GOOD], "rejected": [BAD]}, ASKED),
    "whole conversations": (WHOLE, ASKED),
    "whole conversations next to a prompt": ({"prompt": "Hi?"} | WHOLE, ASKED),
    "ShareGPT pairs": ({"conversations": [OLD]} | OLD_PAIR, ASKED),
    "several turns": ({"conversations": [OLD, OLD_YES, OLD]} | OLD_PAIR, SEVERAL),
    "instruction": ({"instruction": "Hi?", "input": ""} | TEXT, ASKED),
}
# A row with the answer "Good.", and its label.
RATED = {
    "text": ({"prompt": "Hi?", "completion": "Good.", "label": True}, True),
    "messages": ({"messages": [TURN, GOOD], "label": False}, False),
    "parts as messages": ({"prompt": [TURN], "completion": [GOOD], "label": True}, True),
    "ShareGPT": ({"conversations": [OLD, OLD_GOOD], "kto_tag": True}, True),
    "numbers": ({"prompt": "Hi?", "response": "Good.", "label": 0}, False),
    "turns after the answer": ({"messages": [TURN, GOOD, TURN], "label": True}, True),
}


@pytest.fixture(scope="module")
def read():
    from keylayers.data import preferences

    return preferences


def turns(messages):
    return [(message.role, message.content) for message in messages]


@pytest.mark.parametrize("name", PAIRS)
def test_pairs_of_all_formats_are_the_same_pairs(read, name):
    row, prompt = PAIRS[name]
    read.require_preferences("pairs", "dpo", list(row))
    [found], num_dropped = read.preferences([row], "pairs")
    assert turns(found.prompt) == prompt
    answers = [[("assistant", "Good.")], [("assistant", "Bad.")]]
    assert [turns(answer) for answer in found.answers] == answers
    assert num_dropped == 0


@pytest.mark.parametrize("name", RATED)
def test_rated_answers_of_all_formats_are_the_same(read, name):
    row, label = RATED[name]
    read.require_preferences("rated", "kto", list(row))
    [found], _ = read.preferences([row], "rated")
    assert turns(found.prompt) == ASKED
    assert [turns(answer) for answer in found.answers] == [[("assistant", "Good.")]]
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
    read, format, objective, columns, message
):
    with pytest.raises(ValueError, match=message):
        read.require_preferences(format, objective, columns)


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
def test_rows_that_cannot_be_read_are_named(read, format, row, message):
    with pytest.raises(ValueError, match=message):
        read.preferences([row], format)


def test_rows_without_a_prompt_or_an_answer_are_dropped_and_counted(read):
    rows = [{"prompt": "Hi?", "chosen": "Good.", "rejected": " "}, {"prompt": ""} | TEXT]
    found, num_dropped = read.preferences([*rows, {"prompt": "Hi?"} | TEXT], "pairs")
    assert (len(found), num_dropped) == (1, 2)


def prepared(path, objective, max_positions=64, **options):
    from keylayers.data.options import DataOptions
    from keylayers.data.prepare import prepare

    options = DataOptions(data=str(path), **options)
    return prepare(options, tiny_tokenizer(), max_positions, objective)


def write(folder, rows):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def many(kind, count=20):
    prompts = [{"prompt": f"Hi {index}?"} for index in range(count)]
    if kind == "pairs":
        return [prompt | TEXT for prompt in prompts]
    return [p | {"completion": "Good.", "label": i % 2 == 0} for i, p in enumerate(prompts)]


@pytest.mark.parametrize(("objective", "kind"), [("dpo", "pairs"), ("kto", "rated")])
def test_three_splits_that_never_mix(tmp_path, objective, kind):
    data = prepared(write(tmp_path, [*many(kind), *many(kind, 3)]), objective)
    assert (data.counts.num_train, data.counts.num_mask, data.counts.num_held_out) == (16, 2, 2)
    assert data.counts.num_duplicates == 3
    sets = [set(map(str, part["prompt"])) for part in (data.train, data.mask, data.held_out)]
    assert len(set().union(*sets)) == 20
    again = prepared(write(tmp_path, many(kind)[::-1]), objective)
    assert set(map(str, again.held_out["prompt"])) == sets[2]
    other = prepared(write(tmp_path, many(kind)), objective, split_seed=1)
    assert set(map(str, other.held_out["prompt"])) != sets[2]
    assert again.content_sha256 != data.content_sha256  # another order
    assert data.format == kind
    answers = ["chosen", "rejected"] if kind == "pairs" else ["completion", "label"]
    assert data.train.column_names == ["prompt", *answers]
    assert "16 examples to train, 2 for the mask and 2 held out" in data.summary()[0]


@pytest.mark.parametrize(("objective", "num_away", "num_cut"), [("dpo", 1, 1), ("reward", 2, 0)])
def test_what_a_trainer_would_empty_is_left_out_and_what_it_cuts_is_counted(
    tmp_path, objective, num_away, num_cut
):
    long = " ".join(["honey"] * 80)
    rows = [*many("pairs"), {"prompt": long} | TEXT, {"prompt": "Hi?"} | TEXT | {"chosen": long}]
    counts = prepared(write(tmp_path, rows), objective).counts
    assert (counts.num_truncated_away, counts.num_truncated) == (num_away, num_cut)


def test_the_tokens_of_the_answers_are_counted_as_the_trainer_cuts_them(tmp_path):
    counts = prepared(write(tmp_path, many("pairs", 10)), "dpo", held_out=1.0).counts
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
    rows = [row | {"label": True} for row in many("rated")] if kind == "good" else many(kind)
    with pytest.raises(ValueError, match=message):
        prepared(write(tmp_path, rows), objective, **options)


def test_csv_and_parquet_are_read_too(tmp_path):
    from datasets import Dataset

    for kind, objective in (("pairs", "dpo"), ("rated", "kto")):
        table = Dataset.from_list(many(kind))
        table.to_csv(str(tmp_path / "a.csv"), index=False)
        table.to_parquet(str(tmp_path / "a.parquet"))
        expected = prepared(write(tmp_path, many(kind)), objective).content_sha256
        for name in ("a.csv", "a.parquet"):
            assert prepared(tmp_path / name, objective).content_sha256 == expected
