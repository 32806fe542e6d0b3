# SPDX-License-Identifier: Apache-2.0
"""`keylayers train --rank-first`: one run that ranks inside itself, from flags to files."""

import contextlib
import io

import pytest

from commands import PLAIN_PEFT, best, fresh_process, keylayers, read, record_of, updated_modules
from tiny_files import NUM_MODULES

QUICK = ("--mask-batches", "2", "--batch-size", "4", "--lora-rank", "4", "--learning-rate", "0.05")


def rank_first(tiny, output, *more):
    options = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--output", output)
    return keylayers("train", "--rank-first", "--steps", "8", *options, *QUICK, *more)


def worst(output, count):
    return best(output, NUM_MODULES) - best(output, NUM_MODULES - count)


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """The folder of a run, and what it printed."""
    output, out, err = tmp_path_factory.mktemp("first") / "t", io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert rank_first(tiny, output, "--mask-seed", "0") == 0
    return output, out.getvalue(), err.getvalue()


def test_the_worst_quarter_is_frozen_halfway_and_the_output_holds_all(done, capsys):
    output, out, err = done
    assert len(fresh_process(PLAIN_PEFT, output)) == NUM_MODULES
    record = record_of(output)
    assert record["frozen"]["at_step"] == 4
    assert (record["frozen"]["reason"], record["frozen"]["action"]) == ("max_steps", "freeze")
    assert set(record["frozen"]["modules"]) == worst(output, 5)  # 5.25 of 21
    assert not set(record["selection"]["modules"]) & worst(output, 5)
    assert len(record["losses"]) == 8
    assert len(updated_modules(output)) == NUM_MODULES
    base, selected = record["results"]
    assert selected["num_modules"] == NUM_MODULES - 5
    assert selected["held_out_loss_nats"] < base["held_out_loss_nats"]
    assert "selected (others frozen at step 4)" in out
    assert "step 4: the cap is reached; ranking by elimination" in err
    assert "step 4: 5 of 21 modules are frozen" in err
    capsys.readouterr()
    assert keylayers("show", output) == 0
    assert "inside a run, until step 4 of 8 (max_steps)" in capsys.readouterr().out


def test_its_ranking_is_that_of_a_first_stage_of_as_many_steps(tiny, done, tmp_path):
    """The run until then is an ordinary stage 1, and scoring in its middle changes no score."""
    options = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--max-steps", "4")
    assert keylayers("rank", *options, *QUICK, "--output", tmp_path / "r") == 0
    assert read(done[0])["modules"] == read(tmp_path / "r")["modules"]
    more = ("--budget", "5", "--steps", "1", "--output", tmp_path / "again")
    assert keylayers("train", "--ranking", done[0], *more) == 0
    assert len(fresh_process(PLAIN_PEFT, tmp_path / "again")) == 5


def test_removed_modules_are_zero_in_the_adapter(tiny, tmp_path, capsys):
    more = ("--freeze", "0.5", "--action", "remove", "--window", "2", "--epsilon", "100")
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
