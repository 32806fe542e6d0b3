# SPDX-License-Identifier: Apache-2.0
"""From a file to tokenised examples: reading, splitting, counting, recording."""

import csv
import gzip
import json
import re

import pytest

ROWS = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)

# Content of a file, and the message about it.
UNREADABLE = {
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', r"readable as a table.*JSON parse error"),
    "empty.jsonl": (b"", r"must have rows, got none"),
    "empty.json": (b"[]", r"got: Instruction \"train\" corresponds to no data"),
    "empty.csv": (b"", r"got: No columns to parse from file"),
    "mixed.jsonl": (b'{"text": "a"}\n{"text": ["b"]}\n', r"`text` must be text, got list in row 2"),
    "latin.jsonl": ('{"text": "é"}'.encode("latin-1"), r"must be UTF-8 text, got: 'utf-8' codec"),
    "broken.parquet": (b"nothing", r"readable as a table.*Parquet"),
    "notes.docx": (b"x", r"Data files must be of one type \(.json, .jsonl, .csv, .parquet"),
    "columns.jsonl": (b'{"body": "a"}\n', r"must fit a known format, got body"),
    "silent.jsonl": (
        b'{"text": ""}\n',
        r"answers to learn, got 1 rows without one in the .*'text'",
    ),
    "single.jsonl": (b'{"text": "abc"}\n', r"after 1 held out, got 1 usable"),
}


@pytest.fixture(scope="module")
def tokenizer():
    """Needs no files: one token per byte."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


@pytest.fixture(scope="module")
def prepare(tokenizer):
    from keylayers.data.options import DataOptions
    from keylayers.data.prepare import prepare

    def run(data, max_positions=None, **options):
        options = DataOptions(data=str(data), **{"mask_data": "train"} | options)
        return prepare(options, tokenizer, max_positions)

    return run


@pytest.fixture
def alpaca(tmp_path):
    return write(tmp_path / "alpaca.jsonl", ROWS)


def write(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def texts(dataset, tokenizer):
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in dataset["input_ids"]]


def numbers(dataset, tokenizer):
    return [int(re.search(r"Say (\d+)", text).group(1)) for text in texts(dataset, tokenizer)]


def write_csv(path):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)


def write_folder(path):
    path.mkdir()
    write(path / "train-00000.jsonl", ROWS[:8])
    write(path / "train-00001.jsonl", ROWS[8:])
    write(path / "test.jsonl", ROWS[:1])
    (path / "notes.txt").write_text("not data", encoding="utf-8")


def dataset():
    from datasets import Dataset

    return Dataset.from_list(ROWS)


def write_saved_splits(path):
    from datasets import DatasetDict

    DatasetDict({"train": dataset(), "test": dataset().select([0])}).save_to_disk(path)


WRITERS = {
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "a.jsonl": lambda path: path.write_text(LINES),
    "a.csv": write_csv,
    "a.parquet": lambda path: dataset().to_parquet(path),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(LINES.encode())),
    "folder": write_folder,
    "saved": lambda path: dataset().save_to_disk(path),
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
    for example, number in zip(prepared.train, numbers(prepared.train, tokenizer), strict=True):
        whole = tokenizer.decode(example["input_ids"])
        assert whole == f"### Instruction:\nSay {number}.\n\n### Response:\nIt is {number}.</s>"
        counted = [label for label in example["labels"] if label != -100]
        assert tokenizer.decode(counted) == f"It is {number}.</s>"


def test_the_splits_are_complete_never_mix_and_depend_on_content_and_seed_only(
    prepare, alpaca, tmp_path, tokenizer
):
    two = prepare(alpaca, held_out=0.25)
    train, held_out = numbers(two.train, tokenizer), numbers(two.held_out, tokenizer)
    assert (len(held_out), sorted(train + held_out)) == (5, list(range(20)))
    assert train == sorted(train)
    assert (two.mask, two.counts.num_mask) == (None, 0)
    reordered = prepare(write(tmp_path / "reordered.jsonl", ROWS[::-1]), held_out=5.0)
    assert set(numbers(reordered.held_out, tokenizer)) == set(held_out)
    other = prepare(alpaca, held_out=5.0, split_seed=1)
    assert set(numbers(other.held_out, tokenizer)) != set(held_out)
    three = prepare(alpaca, held_out=0.25, mask_data="held-out")
    splits = [numbers(split, tokenizer) for split in (three.train, three.mask, three.held_out)]
    assert [len(split) for split in splits] == [10, 5, 5]
    assert sorted([*splits[0], *splits[1], *splits[2]]) == list(range(20))
    assert splits[2] == held_out
    assert "10 examples to train, 5 for the mask and 5 held out" in three.summary()[0]
    assert three.record()["split_sha256"] != two.record()["split_sha256"]


def test_duplicates_count_once_and_never_reach_both_sides_of_the_split(
    prepare, tmp_path, tokenizer
):
    path = write(tmp_path / "twice.jsonl", [ROWS[0], *ROWS, *ROWS])
    prepared = prepare(path, held_out=0.5)
    assert prepared.counts.num_duplicates == 21
    assert prepared.counts.num_train == prepared.counts.num_held_out == 10
    both = numbers(prepared.train, tokenizer) + numbers(prepared.held_out, tokenizer)
    assert sorted(both) == list(range(20))
    first = prepare(path, max_examples=6, held_out=1.0)
    assert (first.counts.num_examples, first.counts.num_train) == (6, 5)
    whole = prepare(write(tmp_path / "six.jsonl", ROWS[:6]), held_out=1.0)
    assert first.content_sha256 == whole.content_sha256
    assert prepare(path, max_examples=50).content_sha256 == prepare(path).content_sha256


def test_an_edited_file_is_read_again_and_nothing_is_left_behind(
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
    prepared = prepare(write(tmp_path / "a.jsonl", rows), max_length=80, held_out=2.0)
    counts = prepared.counts
    assert (counts.num_dropped_empty, counts.num_duplicates) == (1, 1)
    assert (counts.num_examples, counts.num_train, counts.num_held_out) == (22, 19, 2)
    assert (counts.num_truncated, counts.num_truncated_away) == (1, 1)
    train = prepared.train.to_list()
    assert counts.num_train_tokens == sum(len(example["input_ids"]) for example in train)
    labels = [label for example in train for label in example["labels"]]
    assert counts.num_label_tokens == sum(label != -100 for label in labels)


def test_the_record_and_the_summary_say_what_was_used_and_left_out(prepare, tmp_path):
    path = write(tmp_path / "a.jsonl", [*ROWS, ROWS[0], {"instruction": "q", "output": ""}])
    prepared = prepare(path, max_positions=49, split_seed=3)
    record = json.loads(json.dumps(prepared.record()))
    assert (record["format"], record["split_seed"], record["num_train"]) == ("alpaca", 3, 18)
    assert (record["max_length"], record["max_length_asked"]) == (49, 1024)
    assert record["chat_template"]["name"] == "alpaca"
    assert re.fullmatch("[0-9a-f]{64}", record["content_sha256"])
    assert max(len(ids) for ids in prepared.train["input_ids"]) == 49
    first, left_out, length = prepared.summary()
    assert first.startswith(
        "18 examples to train and 2 held out (format 'alpaca', chat template 'alpaca', up to 49"
    )
    assert left_out == "of the data: 1 without an answer, 1 duplicates, 10 cut at the end"
    assert length == "max_length 1024 lowered to the 49 positions that the model has"
    plain = prepare(write(path, ROWS), max_positions=4000)
    assert (len(plain.summary()), plain.max_length) == (1, 1024)


def test_plain_text_has_no_template_and_counts_every_token(prepare, tmp_path):
    path = write(tmp_path / "text.jsonl", [{"text": f"Text {i}"} for i in range(4)])
    prepared = prepare(path)
    assert prepared.chat_template is None
    assert all(example["labels"] == example["input_ids"] for example in prepared.train)
    with pytest.raises(ValueError, match="works on conversations, got plain text"):
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


# Data, options, and the message.
UNFIT = [
    ("alpaca.jsonl", {"held_out": 2.5}, "got 2.5; 0.1 keeps a tenth"),
    ("alpaca.jsonl", {"held_out": 20.0}, "left to train after 20 held out, got 20 usable"),
    (
        "alpaca.jsonl",
        {"held_out": 10.0, "mask_data": "held-out"},
        "after 10 held out and 10 set aside for the mask, got 20",
    ),
    ("alpaca.jsonl", {"max_length": 10}, "in 10 tokens, got only .* too long, .* up to 40 tokens"),
    ("alpaca.jsonl", {"data_split": "nowhere"}, "nowhere"),
    ("alpacca.jsonl", {}, r"none of them, did you mean 'alpaca.jsonl'\?"),
    ("data/train.jsonl", {}, "got 'data/train.jsonl', which is none of them"),  # no hub name
    ("mixed", {}, r"of one type .* got \.csv and \.jsonl in"),
    ("saved splits", {"data_split": "nowhere"}, "one of train, test .* got 'nowhere'"),
]


@pytest.mark.parametrize(("name", "options", "message"), UNFIT)
def test_data_that_are_not_there_or_do_not_fit_the_options_are_refused(
    prepare, alpaca, monkeypatch, tmp_path, name, options, message
):
    monkeypatch.chdir(tmp_path)
    if name == "saved splits":
        write_saved_splits(tmp_path / name)
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed" / "a.jsonl", ROWS)
    write_csv(tmp_path / "mixed" / "b.csv")
    with pytest.raises(ValueError, match=message):
        prepare(name, **options)


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

    def load(*arguments, **options):
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist\non it")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = r"no such file, and the hub said: Dataset 'owner/name' doesn't exist on it. Check"
    with pytest.raises(ValueError, match=message):
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
    whole = [example for example in prepared.train if len(example["input_ids"]) < 512]
    ends = {(example["input_ids"][-1], example["labels"][-1]) for example in whole}
    assert ends == {(tokenizer.eos_token_id, tokenizer.eos_token_id)}


# Brackets and null inside texts and rows count for nothing.
ODD_ROW = {"prompt": 'a [[[ { \\ " ] null b', "completion": ":-[ \\\\", "c": None}
SOUND_JSON = {
    "lines": "".join(json.dumps(ODD_ROW) + "\n" for _ in range(600)),
    "a list": json.dumps([ODD_ROW] * 600),
    "a list over lines": json.dumps([ODD_ROW] * 600, indent=2),
    "an object over lines": json.dumps({"data": [ODD_ROW, None]}, indent=2),
    "nulls inside rows": '{"a": null, "b": [null, {"c": 1}]}\n' * 3,
    "500 levels": "[" * 500 + "]" * 500,
    "a byte order mark": "\ufeff" + '{"a": "b"}\n',
    "nothing": "",
}
DEADLY_JSON = {
    "null first": ('null\n{"a": "b"}\n', 1),
    "null after a byte order mark": ('\ufeffnull\n{"a": "b"}\n', 1),
    "null in a list": ('[null, {"a": "b"}]', 1),
    "null in a list over lines": ('[\n{"a": "b"},\nnull\n]', 3),
    "null at the start of a block": (json.dumps({"a": "x" * 400_000}) + "\nnull\n", 2),
    "deep over lines": ("[\n" * 501, 501),
    "deep objects": ('{"a":' * 600 + "1" + "}" * 600, 1),
}


@pytest.mark.parametrize("name", ["data.jsonl", "data.json.gz"])
def test_json_that_would_crash_arrow_is_refused_by_line(tmp_path, name):
    from keylayers.data.reading import _check_json
    from keylayers.errors import DataError

    def check(text):
        content = text.encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if ".gz" in name else content)
        _check_json(tmp_path / name)

    for text in SOUND_JSON.values():
        check(text)
    for text, line in DEADLY_JSON.values():
        with pytest.raises(DataError, match=f"nested at most 500 levels deep, but line {line} of"):
            check(text)


def test_json_in_folders_is_checked_too(prepare, tmp_path):
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.jsonl").write_text("null\n")
    with pytest.raises(ValueError, match=r"line 1 of .*b\.jsonl"):
        prepare(tmp_path)
