# SPDX-License-Identifier: Apache-2.0
"""From a file to examples: reading, splitting, counting, recording."""

import gzip
import json
import re
import tempfile

import datasets
import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from keylayers.data import reading
from keylayers.errors import DataError, KeylayersError
from prepared import LINES, PAIRS, RATED, ROWS, numbers, prepare, texts, write


def write_csv(path, rows):
    Dataset.from_list(rows).to_csv(path, index=False)


def write_folder(path, rows):
    path.mkdir()
    write(path / "train-00000.jsonl", rows[:8])
    write(path / "train-00001.jsonl", rows[8:])
    write(path / "test.jsonl", rows[:1])
    (path / "notes.txt").write_text("not data", encoding="utf-8")


def write_saved_splits(path, rows):
    every = Dataset.from_list(rows)
    DatasetDict({"train": every, "test": every.select([0])}).save_to_disk(path)


SOUND = {
    "a.json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "a.csv": write_csv,
    "a.parquet": lambda path, rows: Dataset.from_list(rows).to_parquet(path),
    "a.jsonl.gz": lambda path, _: path.write_bytes(gzip.compress(LINES.encode())),
    "folder": write_folder,
    "saved": lambda path, rows: Dataset.from_list(rows).save_to_disk(path),
    "saved splits": write_saved_splits,
}
PREFERENCES = {"dpo": PAIRS, "kto": RATED}
PLACES = [(name, "sft", ROWS) for name in SOUND]
PLACES += [(name, *each) for name in ("a.csv", "a.parquet") for each in PREFERENCES.items()]


@pytest.mark.parametrize(("name", "objective", "rows"), PLACES)
def test_the_same_rows_give_the_same_examples_from_any_place(
    tmp_path, name, objective, rows, capfd
):
    SOUND[name](tmp_path / name, rows)
    capfd.readouterr()
    expected = prepare(write(tmp_path / "expected.jsonl", rows), objective=objective)
    found = prepare(tmp_path / name, objective=objective)
    assert capfd.readouterr() == ("", "")
    assert found.content_sha256 == expected.content_sha256
    assert found.counts == expected.counts
    assert found.train.to_list() == expected.train.to_list()
    assert found.held_out.to_list() == expected.held_out.to_list()


# The objective, rows, and the columns that its trainer in TRL takes.
OBJECTIVES = [
    ("sft", ROWS, ["input_ids", "labels"]),
    ("dpo", PAIRS, ["prompt", "chosen", "rejected"]),
    ("kto", RATED, ["prompt", "completion", "label"]),
]


@pytest.mark.parametrize(("objective", "rows", "columns"), OBJECTIVES)
def test_the_splits_are_complete_never_mix_and_depend_on_content_and_seed_only(
    tmp_path, objective, rows, columns
):
    path = write(tmp_path / "a.jsonl", rows)
    two = prepare(path, objective=objective, held_out=0.25)
    assert two.train.column_names == two.held_out.column_names == columns
    train, held_out = numbers(two.train), numbers(two.held_out)
    assert (len(held_out), sorted(train + held_out)) == (5, list(range(20)))
    assert train == sorted(train)
    assert (two.mask, two.counts.num_mask) == (None, 0)
    reordered = write(tmp_path / "reordered.jsonl", rows[::-1])
    again = prepare(reordered, objective=objective, held_out=5.0)
    assert set(numbers(again.held_out)) == set(held_out)
    assert again.content_sha256 != two.content_sha256
    other = prepare(path, objective=objective, held_out=5.0, split_seed=1)
    assert set(numbers(other.held_out)) != set(held_out)
    three = prepare(path, objective=objective, held_out=0.25, mask_data="held-out")
    splits = [numbers(split) for split in (three.train, three.mask, three.held_out)]
    assert [len(split) for split in splits] == [10, 5, 5]
    assert sorted([*splits[0], *splits[1], *splits[2]]) == list(range(20))
    assert splits[2] == held_out
    assert "10 examples to train, 5 for the mask and 5 held out" in three.summary()[0]
    assert three.record()["split_sha256"] != two.record()["split_sha256"]


def test_duplicates_count_once_and_never_reach_both_sides_of_the_split(tmp_path):
    path = write(tmp_path / "twice.jsonl", [ROWS[0], *ROWS, *ROWS])
    prepared = prepare(path, held_out=0.5)
    assert prepared.counts.num_duplicates == 21
    assert prepared.counts.num_train == prepared.counts.num_held_out == 10
    assert sorted(numbers(prepared.train) + numbers(prepared.held_out)) == list(range(20))
    first = prepare(path, max_examples=6, held_out=1.0)
    assert (first.counts.num_examples, first.counts.num_train) == (6, 5)
    whole = prepare(write(tmp_path / "six.jsonl", ROWS[:6]), held_out=1.0)
    assert first.content_sha256 == whole.content_sha256
    assert prepare(path, max_examples=50).content_sha256 == prepare(path).content_sha256
    pairs = prepare(write(tmp_path / "pairs.jsonl", [*PAIRS, *PAIRS[:3]]), objective="dpo")
    assert pairs.counts.num_duplicates == 3


def test_an_edited_file_is_read_again_and_nothing_is_left_behind(tmp_path, monkeypatch):
    alpaca = write(tmp_path / "alpaca.jsonl", ROWS)
    for name in ("temporary", "cache"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.enable_progress_bars()
    before, verbosity = sorted(tmp_path.rglob("*")), datasets.logging.get_verbosity()
    first = prepare(alpaca)
    write(alpaca, [{**row, "output": "New."} for row in ROWS])
    assert prepare(alpaca).content_sha256 != first.content_sha256
    with pytest.raises(DataError, match="must have rows"):
        prepare(write(alpaca, []))
    assert sorted(tmp_path.rglob("*")) == before
    assert not datasets.are_progress_bars_disabled()
    assert datasets.logging.get_verbosity() == verbosity


def test_counts_record_and_summary_say_what_was_used_and_left_out(tmp_path):
    rows = [
        *(*ROWS, ROWS[3]),
        {"instruction": "q", "output": ""},
        {"instruction": "cut", "output": "x" * 100},
        {"instruction": "y" * 100, "output": "away"},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    prepared = prepare(path, max_positions=80, held_out=2.0, split_seed=3)
    record, train = json.loads(json.dumps(prepared.record())), prepared.train.to_list()
    num_labels = sum(label != -100 for example in train for label in example["labels"])
    expected = {
        **{"num_examples": 22, "num_train": 19, "num_held_out": 2, "num_duplicates": 1},
        **{"num_dropped_empty": 1, "num_truncated": 1, "num_truncated_away": 1},
        **{"max_length": 80, "max_length_asked": 1024, "format": "alpaca", "split_seed": 3},
        "num_train_tokens": sum(len(example["input_ids"]) for example in train),
        "num_label_tokens": num_labels,
    }
    assert {name: record[name] for name in expected} == expected
    assert max(len(example["input_ids"]) for example in train) == 80
    assert record["chat_template"]["name"] == "alpaca"
    assert re.fullmatch("[0-9a-f]{64}", record["content_sha256"])
    assert prepared.summary() == [
        "19 examples to train and 2 held out (format 'alpaca', chat template 'alpaca', up to 80 "
        f"tokens, the loss on {num_labels} of {record['num_train_tokens']} tokens)",
        "of the data: 1 without an answer, 1 duplicates, 1 cut at the end, 1 too long for any "
        "answer",
        "max_length 1024 lowered to the 80 positions that the model has",
    ]
    plain = prepare(write(path, ROWS), max_positions=4000)
    assert (len(plain.summary()), plain.max_length) == (1, 1024)


@pytest.mark.parametrize(("objective", "num_away", "num_cut"), [("dpo", 1, 1), ("reward", 2, 0)])
def test_pairs_are_counted_as_the_trainer_cuts_them(tmp_path, objective, num_away, num_cut):
    long = "honey " * 20
    rows = [*PAIRS, PAIRS[0] | {"prompt": long}, PAIRS[0] | {"chosen": long}]
    path = write(tmp_path / "a.jsonl", rows)
    counts = prepare(path, objective=objective, max_length=80).counts
    assert (counts.num_truncated_away, counts.num_truncated) == (num_away, num_cut)
    counts = prepare(write(path, PAIRS), objective=objective, held_out=2.0).counts
    assert counts.num_label_tokens == 18 * (6 + 5)  # bytes, and an end of sequence


def test_cells_of_csv_stay_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("question,answer\nwho,007\nwhat,NA\nx,1.50\ny,\n", encoding="utf-8")
    prepared = prepare(path, held_out=1.0)
    found = texts(prepared.train) + texts(prepared.held_out)
    assert sorted(text.split("### Response:\n")[1] for text in found) == ["007", "1.50", "NA"]
    assert prepared.counts.num_dropped_empty == 1


# Name: the content of a file, and the message about it.
UNREADABLE = {
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "readable as a table.*JSON parse error"),
    "empty.jsonl": (b"", "must have rows, got none"),
    "empty.json": (b"[]", 'got: Instruction "train" corresponds to no data'),
    "empty.csv": (b"", "got: No columns to parse from file"),
    "mixed.jsonl": (b'{"text": "a"}\n{"text": ["b"]}\n', "Row 2: `text` must be text, got list"),
    "latin.jsonl": ('{"text": "é"}'.encode("latin-1"), "must be UTF-8 text, got: 'utf-8' codec"),
    "latin.csv": ("text\né".encode("latin-1"), "must be UTF-8 text, got: 'utf-8' codec"),
    "sixteen.jsonl": (LINES.encode("utf-16"), "must be UTF-8 text, got UTF-16 or UTF-32 in"),
    "sixteen.json": (json.dumps(ROWS).encode("utf-16-le"), "must be UTF-8 text, got UTF-16"),
    "sixteen.csv": ("text\na\n".encode("utf-16-be"), "must be UTF-8 text, got UTF-16"),
    "packed.jsonl.gz": (gzip.compress(LINES.encode("utf-16")), "got UTF-16 .*Set-Content"),
    "thirty-two.jsonl": (LINES.encode("utf-32"), "must be UTF-8 text, got UTF-16 or UTF-32"),
    "broken.parquet": (b"nothing", "readable as a table.*Parquet"),
    "notes.docx": (b"x", r"Data files must be of one type \(.json, .jsonl, .csv, .parquet"),
    "columns.jsonl": (b'{"body": "a"}\n', "must fit a known format, got body"),
    "silent.jsonl": (b'{"text": ""}\n', "got 1 examples without one in the format 'text'; check"),
    "single.jsonl": (b'{"text": "abc"}\n', "after 1 held out, got 1 usable"),
}
TALK = [{"role": "user", "content": "Say 1."}, {"role": "assistant", "content": "It is 1."}]
ROWS_OF = {
    "alpaca.jsonl": ROWS,
    "pairs.jsonl": PAIRS,
    "good.jsonl": [row | {"label": True} for row in RATED],
    "text.jsonl": [{"text": "a"}, {"text": "b"}],
    "equal.jsonl": [row | {"rejected": row["chosen"]} for row in PAIRS],
    "both.jsonl": [{"text": "a", "messages": None}, {"text": None, "messages": TALK}],
    "tool.jsonl": [{"messages": [*TALK, *more]} for more in ([], [{"role": "tool"}, *TALK])],
}
FOR_MASK = {"held_out": 10.0, "mask_data": "held-out"}
DPO = {"objective": "dpo"}
# Data, options, and the message.
UNFIT = [
    ("alpaca.jsonl", {"held_out": 2.5}, "got 2.5; 0.1 keeps a tenth"),
    ("alpaca.jsonl", {"held_out": 0.0}, "a share above 0 and below 1, or a whole number .*, got 0"),
    ("alpaca.jsonl", {"held_out": 20.0}, "left to train after 20 held out, got 20 usable"),
    ("alpaca.jsonl", FOR_MASK, "after 10 held out and 10 set aside for the mask, got 20"),
    ("alpaca.jsonl", {"max_length": 10}, "in 10 tokens, got only .* too long, .* up to 40 tokens"),
    ("alpaca.jsonl", {"data_split": "nowhere"}, "nowhere"),
    ("saved splits", {"data_split": "nowhere"}, "split \"nowhere\".*'train', 'test'"),
    ("alpacca.jsonl", {}, r"none of them, did you mean 'alpaca.jsonl'\?"),
    ("data/train.jsonl", {}, "got 'data/train.jsonl', which is none of them"),  # no hub name
    ("mixed", {}, r"of one type .* got \.csv and \.jsonl in"),
    ("text.jsonl", {"chat_template": "alpaca"}, "works on conversations, got plain text"),
    ("pairs.jsonl", DPO | {"format": "alpaca"}, "`format` must be left out with `objective` dpo"),
    ("pairs.jsonl", DPO | {"max_length": 4}, "must leave room for an answer in 4 tokens"),
    ("pairs.jsonl", {}, "choose an objective for preferences with `--objective`"),
    ("equal.jsonl", DPO, "Pairs must have different answers, got 20 of equal ones"),
    ("both.jsonl", {}, "Row 1: Conversations and plain text must be in separate data sets"),
    ("tool.jsonl", {}, "Row 2: The chat template must render turns .* 'alpaca' has no `tool`"),
    ("good.jsonl", {"objective": "kto"}, "Rated answers must be good and bad"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory, with data that can be read."""
    for name, rows in ROWS_OF.items():
        write(tmp_path / name, rows)
    for name, (content, _) in UNREADABLE.items():
        (tmp_path / name).write_bytes(content)
    write_saved_splits(tmp_path / "saved splits", ROWS)
    (tmp_path / "mixed").mkdir()
    write(tmp_path / "mixed" / "a.jsonl", ROWS)
    write_csv(tmp_path / "mixed" / "b.csv", ROWS)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [*((name, {}, message) for name, (_, message) in UNREADABLE.items()), *UNFIT],
)
def test_data_that_cannot_be_used_are_refused_in_one_line(name, options, message):
    with pytest.raises(KeylayersError, match=message) as caught:
        prepare(name, **options)
    assert "\n" not in str(caught.value)


def test_a_hub_name_is_read_with_its_configuration_or_says_why_not(monkeypatch):
    asked = []

    def load(**arguments):
        asked.append(arguments)
        if arguments["name"] == "nothing":
            raise datasets.exceptions.DatasetNotFoundError("'owner/name' doesn't exist\non it")
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(reading, "load_dataset", load)
    prepare("owner/name:main", data_split="train[:50%]")
    prepare("owner/name")
    assert asked == [
        {"path": "owner/name", "name": "main", "split": "train[:50%]"},
        {"path": "owner/name", "name": None, "split": "train"},
    ]
    message = r"no such file, and the hub said: 'owner/name' doesn't exist on it. Check"
    with pytest.raises(DataError, match=message):
        prepare("owner/name:nothing")


# A file, the objective and the format; how many examples are used, how many duplicates there are.
REAL = [
    ("sft/alpaca_gpt4_999.json", "sft", "alpaca", 985, 14),
    ("sft/user_oriented_252.jsonl", "sft", "self-instruct", 252, 0),
    ("preference/dpo_300.json", "dpo", "pairs", 60, 5),
    ("preference/kto_300.json", "kto", "rated", 60, 0),
]


@pytest.mark.parametrize(("name", "objective", "format", "num_examples", "num_duplicates"), REAL)
def test_real_data_is_prepared_for_a_real_model(
    shared, name, objective, format, num_examples, num_duplicates
):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models/english-2m")
    path = shared / "data" / name
    found = prepare(path, 512, objective, tokenizer, max_examples=num_examples)
    assert (found.format, found.chat_template.source) == (format, "model")
    counts = found.counts
    assert (counts.num_examples, counts.num_duplicates) == (num_examples, num_duplicates)
    if objective == "sft":
        whole = [example for example in found.train if len(example["input_ids"]) < 512]
        ends = {(example["input_ids"][-1], example["labels"][-1]) for example in whole}
        assert ends == {(tokenizer.eos_token_id, tokenizer.eos_token_id)}


# Brackets and null inside texts and rows count for nothing.
ODD_ROW = {"prompt": 'a [[[ { \\ " ] null b', "completion": ":-[ \\\\", "c": None}
SOUND_JSON = [
    "".join(json.dumps(ODD_ROW) + "\n" for _ in range(600)),
    json.dumps([ODD_ROW] * 600),
    json.dumps([ODD_ROW] * 600, indent=2),
    json.dumps({"data": [ODD_ROW, None]}, indent=2),
    '{"a": null, "b": [null, {"c": 1}]}\n' * 3,
    "[" * 500 + "]" * 500,
    '\ufeff{"a": "b"}\n',  # a byte order mark
    "",
]
# JSON, and the line that is refused.
DEADLY_JSON = [
    ('null\n{"a": "b"}\n', 1),
    ('\ufeffnull\n{"a": "b"}\n', 1),
    ('[null, {"a": "b"}]', 1),
    ('[\n{"a": "b"},\nnull\n]', 3),
    (json.dumps({"a": "x" * 400_000}) + "\nnull\n", 2),  # at the start of a block
    ("[\n" * 501, 501),
    ('{"a":' * 600 + "1" + "}" * 600, 1),
]


@pytest.mark.parametrize("name", ["data.jsonl", "data.json.gz", "deep/data.jsonl"])
def test_json_that_would_crash_arrow_is_refused_by_line(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)

    def check(text):
        path.write_bytes(gzip.compress(text.encode()) if ".gz" in name else text.encode())
        reading._local(path.parent if "deep" in name else path, str(tmp_path))

    for text in SOUND_JSON:
        check(text)
    for text, line in DEADLY_JSON:
        with pytest.raises(DataError, match=f"nested at most 500 levels deep, but line {line} of"):
            check(text)
