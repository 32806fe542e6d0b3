# SPDX-License-Identifier: Apache-2.0
"""`keylayers train --rank-first`: one run that ranks inside itself, from flags to files."""

from commands import PLAIN_PEFT, best, fresh_process, keylayers, read, record_of, updated_modules
from tiny_files import NUM_MODULES

QUICK = ("--mask-batches", "2", "--batch-size", "4", "--lora-rank", "4", "--learning-rate", "0.05")


def rank_first(tiny, output, *more):
    options = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--output", output)
    return keylayers("train", "--rank-first", "--steps", "8", *options, *QUICK, *more)


def worst(output, count):
    return best(output, NUM_MODULES) - best(output, NUM_MODULES - count)


def test_the_worst_quarter_is_frozen_halfway_and_the_output_holds_all(tiny, tmp_path, capsys):
    output = tmp_path / "t"
    assert rank_first(tiny, output, "--mask-seed", "0") == 0
    out, err = capsys.readouterr()
    worst_5 = worst(output, 5)  # 5.25 of 21
    assert len(fresh_process(PLAIN_PEFT, output)) == len(updated_modules(output)) == NUM_MODULES
    record = record_of(output)
    frozen = record["frozen"]
    assert (frozen["at_step"], frozen["reason"]) == (4, "max_steps")
    assert (frozen["action"], set(frozen["modules"])) == ("freeze", worst_5)
    assert not set(record["selection"]["modules"]) & worst_5
    assert len(record["losses"]) == 8
    base, selected = record["results"]
    assert selected["num_modules"] == NUM_MODULES - 5
    assert selected["held_out_loss_nats"] < base["held_out_loss_nats"]
    assert "selected (others frozen at step 4)" in out
    assert "step 4: the cap is reached; ranking by elimination" in err
    assert "step 4: 5 of 21 modules are frozen" in err
    assert keylayers("show", output) == 0
    assert "inside a run, until step 4 of 8 (max_steps)" in capsys.readouterr().out
    # The run until then is an ordinary stage 1, and scoring in its middle changes no score.
    options = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--max-steps", "4")
    assert keylayers("rank", *options, *QUICK, "--output", tmp_path / "r") == 0
    assert read(output)["modules"] == read(tmp_path / "r")["modules"]
    more = ("--budget", "5", "--steps", "1", "--output", tmp_path / "again")
    assert keylayers("train", "--ranking", output, *more) == 0
    assert len(fresh_process(PLAIN_PEFT, tmp_path / "again")) == 5


def test_removed_modules_are_zero_in_the_adapter(tiny, tmp_path, capsys):
    more = ("--freeze", "0.5", "--action", "remove", "--window", "2", "--epsilon", "100")
    more += ("--warmup-steps", "0")
    assert rank_first(tiny, tmp_path / "t", *more, "--max-steps", "7") == 0
    record = record_of(tmp_path / "t")
    assert (record["frozen"]["at_step"], record["frozen"]["reason"]) == (4, "stable")
    removed = worst(tmp_path / "t", 11)  # 10.5, a half up
    assert set(record["frozen"]["modules"]) == removed
    assert updated_modules(tmp_path / "t") == best(tmp_path / "t", 10)
    assert "11 of 21 modules are set to zero and frozen" in capsys.readouterr().err


def test_controls_freeze_as_many_others_at_the_same_step(tiny, tmp_path):
    assert rank_first(tiny, tmp_path / "t", "--controls", "all", "random", "first", "last") == 0
    rows = record_of(tmp_path / "t")["results"]
    assert [(row["label"], row["num_modules"]) for row in rows] == [
        ("base model", 0),
        ("selected (others frozen at step 4)", 16),
        ("all", 21),
        *((f"{name} (others frozen at step 4)", 16) for name in ("random", "first", "last")),
    ]
    assert len({row["held_out_loss_nats"] for row in rows}) == len(rows)
