# SPDX-License-Identifier: Apache-2.0
"""From a file to tokenised examples: reading, splitting, counting, recording."""

import csv
import gzip
import json
import re

import pytest

ROWS = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(20)]

# Content of a file, and the message about it.
UNREADABLE = {
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"readable as a table.*JSON parse error"),
    "empty.jsonl": (b"", r"must have rows, got none"),
    "empty.json": (b"[]", r"got: Instruction \"train\" corresponds to no data"),
    "empty.csv": (b"", r"got: No columns to parse from file"),
    "mixed.jsonl": (b'{"text": "a"}\n{"text": ["b"]}\n', r"`text` must be text, got list in row 2"),
    "latin.jsonl": ('{"text": "é"}'.encode("latin-1"), r"must be UTF-8 text, got: 'utf-8' codec"),
    "broken.parquet": (b"nothing", r"readable as a table.*Parquet"),
    "notes.docx": (b"x", r"Data files must be of one kind \(.json, .jsonl, .csv, .parquet"),
    "columns.jsonl": (b'{"body": "a"}\n', r"must fit a known format, got body"),
    "silent.jsonl": (
        b'{"instruction": "q", "output": ""}\n',
        r"must hold answers to learn, got 1 rows without one in the format 'alpaca'",
    ),
    "single.jsonl": (b'{"text": "abc"}\n', r"after 1 held out, got 1 usable"),
}


@pytest.fixture(scope="module")
def tokenizer():
    """Needs no files: one token per byte."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


@pytest.fixture
def prepare(tokenizer):
    from keylayers.data.options import DataOptions
    from keylayers.data.prepare import prepare

    def run(data, max_positions=None, **options):
        two_splits = {"mask_data": "train"}
        return prepare(
            DataOptions(data=str(data), **two_splits | options), tokenizer, max_positions
        )

    return run


@pytest.fixture
def alpaca(tmp_path):
    return write(tmp_path / "alpaca.jsonl", ROWS)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def texts(dataset, tokenizer):
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in dataset["input_ids"]]


def write_json(path):
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")


def write_csv(path):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path):
    import datasets

    datasets.Dataset.from_list(ROWS).to_parquet(path)


def write_gzip(path):
    path.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in ROWS).encode()))


def write_folder(path):
    path.mkdir()
    write(path / "train-00000.jsonl", ROWS[:8])
    write(path / "train-00001.jsonl", ROWS[8:])
    write(path / "test.jsonl", ROWS[:1])
    (path / "notes.txt").write_text("not data", encoding="utf-8")


def write_saved(path):
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(path)


def write_saved_splits(path):
    import datasets

    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(path)


WRITERS = {
    "a.json": write_json,
    "a.jsonl": lambda path: write(path, ROWS),
    "a.csv": write_csv,
    "a.parquet": write_parquet,
    "a.jsonl.gz": write_gzip,
    "folder": write_folder,
    "saved": write_saved,
    "saved splits": write_saved_splits,
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_give_the_same_examples_from_any_place(
    prepare, alpaca, tmp_path, name, capfd
):
    WRITERS[name](tmp_path / name)
    capfd.readouterr()
    expected, found = prepare(alpaca), prepare(tmp_path / name)
    assert capfd.readouterr() == ("", "")
    assert found.content_sha256 == expected.content_sha256
    assert found.counts == expected.counts
    assert found.train.to_list() == expected.train.to_list()
    assert found.held_out.to_list() == expected.held_out.to_list()


def test_the_examples_are_what_trl_takes_as_it_is(prepare, alpaca, tokenizer):
    prepared = prepare(alpaca, held_out=4.0)
    assert prepared.train.column_names == prepared.held_out.column_names == ["input_ids", "labels"]
    for example in prepared.train:
        counted = [label for label in example["labels"] if label != -100]
        whole = tokenizer.decode(example["input_ids"])
        number = re.search(r"Say (\d+)\.", whole).group(1)
        assert whole == f"### Instruction:\nSay {number}.\n\n### Response:\nIt is {number}.</s>"
        assert tokenizer.decode(counted) == f"It is {number}.</s>"


def test_training_and_held_out_examples_are_all_of_them_in_order(prepare, alpaca, tokenizer):
    prepared = prepare(alpaca, held_out=0.25)
    train, held_out = (texts(split, tokenizer) for split in (prepared.train, prepared.held_out))
    numbers = [
        [int(re.search(r"Say (\d+)", text).group(1)) for text in s] for s in (train, held_out)
    ]
    assert len(held_out) == 5
    assert sorted(numbers[0] + numbers[1]) == list(range(20))
    assert numbers[0] == sorted(numbers[0])


def test_the_split_depends_on_content_and_seed_only(prepare, alpaca, tmp_path, tokenizer):
    reordered = write(tmp_path / "reordered.jsonl", ROWS[::-1])
    held_out = set(texts(prepare(alpaca, held_out=5.0).held_out, tokenizer))
    assert set(texts(prepare(reordered, held_out=5.0).held_out, tokenizer)) == held_out
    assert set(texts(prepare(alpaca, held_out=5.0, split_seed=1).held_out, tokenizer)) != held_out


def test_three_splits_never_mix_and_the_held_out_one_is_the_same(prepare, alpaca, tokenizer):
    two = prepare(alpaca, held_out=5.0)
    assert two.mask is None
    assert two.counts.num_mask == 0
    three = prepare(alpaca, held_out=5.0, mask_data="held-out")
    splits = [set(texts(split, tokenizer)) for split in (three.train, three.mask, three.held_out)]
    assert [len(split) for split in splits] == [10, 5, 5]
    assert len(set().union(*splits)) == 20
    assert splits[2] == set(texts(two.held_out, tokenizer))
    assert "10 examples to train, 5 for the mask and 5 held out" in three.summary()[0]
    assert three.record()["split_sha256"] != two.record()["split_sha256"]


def test_examples_for_the_mask_must_leave_some_to_train(prepare, alpaca):
    from keylayers.errors import DataError

    with pytest.raises(DataError, match="after 10 held out and 10 set aside for the mask, got 20"):
        prepare(alpaca, held_out=10.0, mask_data="held-out")


def test_duplicates_never_reach_both_sides_of_the_split(prepare, tmp_path, tokenizer):
    prepared = prepare(write(tmp_path / "twice.jsonl", [*ROWS, *ROWS, ROWS[0]]), held_out=0.5)
    assert prepared.counts.num_duplicates == 21
    assert prepared.counts.num_train == prepared.counts.num_held_out == 10
    train, held_out = (texts(split, tokenizer) for split in (prepared.train, prepared.held_out))
    assert set(train) & set(held_out) == set()


def test_fewer_examples_are_the_first_distinct_ones(prepare, tmp_path, tokenizer):
    path = write(tmp_path / "twice.jsonl", [ROWS[0], *ROWS])
    prepared = prepare(path, max_examples=6, held_out=1.0)
    assert (prepared.counts.num_examples, prepared.counts.num_train) == (6, 5)
    whole = prepare(write(tmp_path / "six.jsonl", ROWS[:6]), held_out=1.0)
    assert prepared.content_sha256 == whole.content_sha256
    assert prepare(path, max_examples=50).content_sha256 == prepare(path).content_sha256


def test_an_edited_file_is_read_anew_and_nothing_is_left_behind(
    prepare, alpaca, tmp_path, monkeypatch
):
    import tempfile
    from pathlib import Path

    import datasets

    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    places = [Path(datasets.config.HF_DATASETS_CACHE), tmp_path]
    before = [sorted(place.rglob("*")) for place in places if place.is_dir()]
    first = prepare(alpaca)
    write(alpaca, [{**row, "output": "New."} for row in ROWS])
    assert prepare(alpaca).content_sha256 != first.content_sha256
    assert [sorted(place.rglob("*")) for place in places if place.is_dir()] == before


def test_datasets_prints_as_before_afterwards(prepare, alpaca, tmp_path):
    import datasets

    datasets.enable_progress_bars()
    verbosity = datasets.logging.get_verbosity()
    prepare(alpaca)
    with pytest.raises(ValueError, match="must have rows"):
        prepare(write(tmp_path / "empty.jsonl", []))
    assert not datasets.are_progress_bars_disabled()
    assert datasets.logging.get_verbosity() == verbosity


def test_the_counts_tell_what_became_of_every_row(prepare, tmp_path):
    rows = [
        *ROWS,
        ROWS[3],
        {"instruction": "q", "output": ""},
        {"instruction": "cut", "output": "x" * 100},
        {"instruction": "y" * 100, "output": "away"},
    ]
    counts = prepare(write(tmp_path / "a.jsonl", rows), max_length=80, held_out=2.0).counts
    assert (counts.num_dropped_empty, counts.num_duplicates) == (1, 1)
    assert (counts.num_examples, counts.num_train, counts.num_held_out) == (22, 19, 2)
    assert (counts.num_truncated, counts.num_truncated_away) == (1, 1)


def test_tokens_are_counted_in_the_training_examples(prepare, alpaca):
    prepared = prepare(alpaca)
    train = prepared.train.to_list()
    assert prepared.counts.num_train_tokens == sum(len(one["input_ids"]) for one in train)
    labels = [label for one in train for label in one["labels"]]
    assert prepared.counts.num_label_tokens == sum(label != -100 for label in labels)


def test_the_length_is_lowered_to_what_the_model_allows(prepare, alpaca):
    record = prepare(alpaca, max_positions=45).record()
    assert (record["max_length"], record["max_length_asked"]) == (45, 1024)
    assert prepare(alpaca, max_positions=4000).max_length == 1024
    assert max(len(ids) for ids in prepare(alpaca, max_positions=45).train["input_ids"]) == 45


def test_prompts_that_leave_no_room_are_refused_with_the_lengths(prepare, alpaca):
    from keylayers.errors import DataError

    message = r"in 10 tokens, got only prompts that leave none, the longest of 40 tokens"
    with pytest.raises(DataError, match=message):
        prepare(alpaca, max_length=10)


def test_the_record_is_json_and_holds_options_counts_and_template(prepare, alpaca):
    record = json.loads(json.dumps(prepare(alpaca, split_seed=3).record()))
    assert (record["format"], record["split_seed"], record["num_train"]) == ("alpaca", 3, 18)
    assert record["chat_template"]["name"] == "alpaca"
    assert re.fullmatch("[0-9a-f]{64}", record["content_sha256"])


def test_the_summary_says_what_was_left_out(prepare, tmp_path):
    path = write(tmp_path / "a.jsonl", [*ROWS, ROWS[0], {"instruction": "q", "output": ""}])
    first, left_out, length = prepare(path, max_positions=49).summary()
    assert first.startswith(
        "18 examples to train and 2 held out (format 'alpaca', chat template 'alpaca', up to 49"
    )
    assert left_out == "of the data: 1 without an answer, 1 duplicates, 10 cut at the end"
    assert length == "max_length 1024 lowered to the 49 positions that the model has"
    assert len(prepare(write(path, ROWS)).summary()) == 1


def test_plain_text_has_no_template_and_counts_every_token(prepare, tmp_path):
    path = write(tmp_path / "text.jsonl", [{"text": f"Text {i}"} for i in range(4)])
    prepared = prepare(path)
    assert prepared.chat_template is None
    assert all(one["labels"] == one["input_ids"] for one in prepared.train)


def test_a_template_for_plain_text_is_refused_as_it_has_no_effect(prepare, tmp_path):
    from keylayers.errors import ConfigError

    path = write(tmp_path / "text.jsonl", [{"text": "a"}])
    with pytest.raises(ConfigError, match="works on conversations, got plain text"):
        prepare(path, chat_template="alpaca")


def test_cells_of_csv_stay_text(prepare, tmp_path, tokenizer):
    path = tmp_path / "a.csv"
    path.write_text("question,answer\nwho,007\nwhat,NA\nx,1.50\ny,\n", encoding="utf-8")
    prepared = prepare(path, held_out=1.0)
    found = texts(prepared.train, tokenizer) + texts(prepared.held_out, tokenizer)
    assert sorted(text.split("### Response:\n")[1] for text in found) == ["007", "1.50", "NA"]
    assert prepared.counts.num_dropped_empty == 1


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_cannot_be_used_is_refused_in_one_line(prepare, tmp_path, name):
    from keylayers.errors import DataError

    content, message = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        prepare(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_number_of_held_out_examples_is_whole(prepare, alpaca):
    from keylayers.errors import ConfigError

    with pytest.raises(ConfigError, match=r"got 2.5; 0.1 keeps a tenth"):
        prepare(alpaca, held_out=2.5)


def test_holding_everything_out_is_refused(prepare, alpaca):
    from keylayers.errors import DataError

    with pytest.raises(DataError, match=r"left to train after 20 held out, got 20 usable"):
        prepare(alpaca, held_out=20.0)


def test_a_missing_file_gets_a_suggestion(prepare, alpaca):
    from keylayers.errors import DataError

    with pytest.raises(DataError, match=r"none of them, did you mean 'alpaca.jsonl'\?"):
        prepare(alpaca.with_name("alpacca.jsonl"))


def test_a_missing_relative_file_is_not_taken_for_a_hub_name(prepare, monkeypatch, tmp_path):
    from keylayers.errors import DataError

    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"got 'data/train.jsonl', which is none of them"):
        prepare("data/train.jsonl")


@pytest.mark.parametrize("name", ["saved splits", "a.jsonl"])
def test_a_split_that_is_not_there_is_refused(prepare, tmp_path, name):
    from keylayers.errors import DataError

    WRITERS[name](tmp_path / name)
    with pytest.raises(DataError, match=r"nowhere"):
        prepare(tmp_path / name, data_split="nowhere")


def test_a_folder_of_several_kinds_is_refused(prepare, tmp_path):
    from keylayers.errors import DataError

    write(tmp_path / "a.jsonl", ROWS)
    write_csv(tmp_path / "b.csv")
    with pytest.raises(DataError, match=r"of one kind .* got \.csv and \.jsonl in"):
        prepare(tmp_path)


def test_a_hub_name_is_read_with_its_configuration(prepare, monkeypatch):
    import datasets

    asked = []

    def load(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    prepare("owner/name:main", data_split="train[:50%]")
    prepare("owner/name")
    assert asked == [
        (("owner/name", "main"), {"split": "train[:50%]"}),
        (("owner/name", None), {"split": "train"}),
    ]


def test_an_unreachable_hub_name_says_why_in_one_line(prepare, monkeypatch):
    import datasets

    from keylayers.errors import DataError

    def load(*arguments, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist\non it")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = r"no such file, and the hub said: Dataset 'owner/name' doesn't exist on it. Check"
    with pytest.raises(DataError, match=message):
        prepare("owner/name")


@pytest.mark.parametrize(
    ("name", "format", "counts"),
    [
        ("sft/alpaca_gpt4_999.json", "alpaca", (985, 14)),
        ("sft/user_oriented_252.jsonl", "self-instruct", (252, 0)),
    ],
)
def test_real_data_is_prepared_for_a_real_model(shared, name, format, counts):
    from transformers import AutoTokenizer

    from keylayers.data.options import DataOptions
    from keylayers.data.prepare import prepare

    tokenizer = AutoTokenizer.from_pretrained(shared / "models/english-2m")
    prepared = prepare(DataOptions(data=str(shared / "data" / name)), tokenizer, 512)
    assert prepared.format == format
    assert (prepared.counts.num_examples, prepared.counts.num_duplicates) == counts
    assert prepared.chat_template.source == "model"
    whole = [one for one in prepared.train if len(one["input_ids"]) < 512]
    ends = {(one["input_ids"][-1], one["labels"][-1]) for one in whole}
    assert ends == {(tokenizer.eos_token_id, tokenizer.eos_token_id)}
