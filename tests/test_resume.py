# SPDX-License-Identifier: Apache-2.0
"""A run that was stopped goes on with the same command, and ends bit for bit as if it had not been.

`test_kill.py` kills processes at any moment; here a run is stopped at a known step.
"""

import json

import pytest

from commands import file_for, keylayers
from outputs import contents, differences

SMALL = ["--batch-size", "4", "--lora-rank", "4", "--mask-batches", "2", "--save-steps", "2"]
TRAIN = ["--rank-first", "--steps", "8", "--learning-rate", "0.05"]


class Stop:
    """Raises what Ctrl-C raises after step `at` of training number `of`."""

    def __init__(self, monkeypatch, at, of=1):
        from keylayers.training.checkpoints import Checkpoints

        self.at, self.of = at, of
        self.num_trainings, self.first_steps = 0, []
        on_train_begin, on_step_end = Checkpoints.on_train_begin, Checkpoints.on_step_end

        def begin(this, args, state, control, **kwargs):
            self.num_trainings += 1
            self.first_steps.append(state.global_step)
            on_train_begin(this, args, state, control, **kwargs)

        def step(this, args, state, control, **kwargs):
            if self.num_trainings == self.of and state.global_step == self.at:
                raise KeyboardInterrupt
            on_step_end(this, args, state, control, **kwargs)

        monkeypatch.setattr(Checkpoints, "on_train_begin", begin)
        monkeypatch.setattr(Checkpoints, "on_step_end", step)


def stopped_and_unbroken(monkeypatch, tmp_path, *arguments, at=5, of=1):
    """What both runs leave, and the steps before which the trainings of the resumed one began."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for parent in (whole, broken):
        parent.mkdir()
    monkeypatch.chdir(whole)
    assert keylayers(*arguments, "--output", "out") == 0
    monkeypatch.chdir(broken)
    with monkeypatch.context() as patched:
        Stop(patched, at, of)
        assert keylayers(*arguments, "--output", "out") == 130
    with monkeypatch.context() as patched:
        seen = Stop(patched, None)
        assert keylayers(*arguments, "--output", "out") == 0
    return contents(whole), contents(broken), seen.first_steps


STAGE_1 = {
    "lora": ["--learning-rate", "0.01"],
    "rslora": ["--update", "rslora"],
    "dora": ["--update", "dora"],
    "full": ["--update", "full"],
    "accumulated": ["--gradient-accumulation", "3"],
    "checkpointed": ["--gradient-checkpointing"],
    "bfloat16": ["--dtype", "bfloat16"],
    "until stable": ["--window", "3", "--epsilon", "100"],
}


@pytest.mark.long
@pytest.mark.parametrize("name", STAGE_1)
def test_a_ranking_goes_on_inside_stage_1(tiny, tmp_path, monkeypatch, capsys, name):
    inputs = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--max-steps", 8)
    arguments = ("rank", *inputs, *SMALL, *STAGE_1[name])
    whole, broken, first_steps = stopped_and_unbroken(monkeypatch, tmp_path, *arguments)
    assert differences(whole, broken) == []
    assert first_steps == [4]
    assert "stage 1 goes on after step 4" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("objective", ["dpo", "kto", "orpo", "reward"])
def test_so_does_every_objective(tiny, preferences, tmp_path, monkeypatch, objective):
    inputs = ("--model", tiny / "model", "--data", file_for(preferences, objective))
    arguments = ("rank", *inputs, "--objective", objective, "--max-steps", 8, *SMALL)
    whole, broken, first_steps = stopped_and_unbroken(monkeypatch, tmp_path, *arguments)
    assert differences(whole, broken) == []
    assert first_steps == [4]


# A training that is stopped -> in which of its fine-tunes and after which step; where it goes on.
TRAININGS = {
    "the selection": ([], 1, 5, [4, 0]),
    "a control": ([], 2, 5, [4]),
    "removed": (["--action", "remove"], 1, 7, [6, 0]),
    "before the freeze": ([], 1, 3, [2, 0]),
}


@pytest.mark.long
@pytest.mark.parametrize("name", TRAININGS)
def test_a_run_that_ranks_inside_itself_goes_on(tiny, tmp_path, monkeypatch, name):
    more, of, at, expected = TRAININGS[name]
    inputs = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--controls", "random")
    arguments = ("train", *inputs, *TRAIN, *SMALL, *more)
    whole, broken, first_steps = stopped_and_unbroken(
        monkeypatch, tmp_path, *arguments, at=at, of=of
    )
    assert differences(whole, broken) == []
    assert first_steps == expected


@pytest.mark.long
@pytest.mark.parametrize("more", [[], ["--update", "full"], ["--prefix-cache-gib", "1"]])
def test_training_on_a_ranking_goes_on_in_the_selection_and_in_controls(
    tiny, tmp_path, monkeypatch, more
):
    ranking = tmp_path / "ranking"
    inputs = (
        "--model",
        tiny / "model",
        "--data",
        tiny / "data.jsonl",
        "--max-steps",
        4,
        "--lora-rank",
        4,
    )
    assert keylayers("rank", *inputs, "--method", "last", "--output", ranking) == 0
    options = ("--ranking", ranking, "--budget", "0.3", "--steps", 16, "--save-steps", 2, *more)
    arguments = ("train", *options, "--controls", "random", "worst")
    for of, expected in ((1, [4, 0, 0]), (3, [4])):
        place = tmp_path / str(of)
        place.mkdir()
        whole, broken, first_steps = stopped_and_unbroken(
            monkeypatch, place, *arguments, at=5, of=of
        )
        assert differences(whole, broken) == []
        assert first_steps == expected


def test_a_finished_training_of_the_same_inputs_is_taken(tiny, tmp_path, monkeypatch, capsys):
    inputs = ("--model", tiny / "model", "--data", tiny / "data.jsonl")
    arguments = ("train", *inputs, *TRAIN, *SMALL, "--output", tmp_path / "t")
    assert keylayers(*arguments) == 0
    first, table = contents(tmp_path / "t"), capsys.readouterr().out
    seen = Stop(monkeypatch, None)
    assert keylayers(*arguments) == 0
    assert differences(first, contents(tmp_path / "t")) == []
    out, err = capsys.readouterr()
    assert out == table
    assert "the training of the same inputs is taken from" in err
    assert seen.num_trainings == 0
    assert keylayers(*arguments, "--seed", "1") == 0  # other inputs
    assert seen.num_trainings == 1


def test_checkpoints_of_other_inputs_and_half_written_ones_are_not_gone_on_from(tmp_path):
    from keylayers.files import RECORD
    from keylayers.training.checkpoints import Checkpoints

    marks = {
        "checkpoint-2": json.dumps({"inputs_sha256": "a", "seconds": 1.5}),
        "checkpoint-10": json.dumps({"inputs_sha256": "a", "seconds": 3.0}),
        "checkpoint-20": json.dumps({"inputs_sha256": "b", "seconds": 3.0}),
        "checkpoint-30": None,
        "checkpoint-40": "{",
        "other": json.dumps({"inputs_sha256": "a", "seconds": 3.0}),
    }
    for name, mark in marks.items():
        (tmp_path / name).mkdir()
        if mark is not None:
            (tmp_path / name / RECORD).write_text(mark)
    found = Checkpoints(tmp_path, "a")
    assert (found.last, found.last_step) == (tmp_path / "checkpoint-10", 10)
    assert found.seconds >= 3.0
    assert sorted(one.name for one in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    assert Checkpoints(tmp_path / "nowhere", "a").last is None
