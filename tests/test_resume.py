# SPDX-License-Identifier: Apache-2.0
"""A run that was stopped goes on with the same command, and ends bit for bit as if it had not been.

`test_crash.py` kills processes at any moment; here a run is stopped at a known step.
"""

import pytest

from commands import keylayers
from keylayers.files import RECORD
from keylayers.training.checkpoints import Checkpoints
from outputs import contents, differences

SMALL = ["--batch-size", "4", "--lora-rank", "4", "--save-steps", "2"]
TRAIN = ["--rank-first", "--steps", "8", "--learning-rate", "0.05"]
SFT = "--model {model} --data {data}"
RANK = f"rank {SFT} --max-steps 8"
RANK_FIRST = f"train {SFT} --controls random {' '.join(TRAIN)}"
ON_A_RANKING = "train --ranking {ranked} --budget 0.3 --steps 8 --controls random"


def on(file, objective):
    return f"rank --model {{model}} --data {{{file}}} --objective {objective} --max-steps 8"


RANKINGS = {
    "lora": f"{RANK} --learning-rate 0.01",
    "rslora": f"{RANK} --update rslora",
    "dora": f"{RANK} --update dora",
    "full": f"{RANK} --update full",
    "accumulated": f"{RANK} --gradient-accumulation 3",
    "checkpointed": f"{RANK} --gradient-checkpointing",
    "bfloat16": f"{RANK} --dtype bfloat16",
    "until stable": f"{RANK} --window 3 --epsilon 100 --warmup-steps 0",
    "dpo": on("pairs", "dpo"),
    "kto": on("rated", "kto"),
    "orpo": on("pairs", "orpo"),
    "reward": on("pairs", "reward"),
}
# Name -> the command; which of its trainings is stopped, and after which step; before which steps
# the trainings of the command that goes on begin.
CASES = {
    **{name: (command, 1, 5, [4]) for name, command in RANKINGS.items()},
    "rank first": (RANK_FIRST, 1, 5, [4, 0]),
    "rank first, in a control": (RANK_FIRST, 2, 5, [4]),
    "rank first, removed": (f"{RANK_FIRST} --action remove", 1, 7, [6, 0]),
    "rank first, before the freeze": (RANK_FIRST, 1, 3, [2, 0]),
    "on a ranking": (ON_A_RANKING, 1, 5, [4, 0]),
    "on a ranking, in a control": (ON_A_RANKING, 2, 5, [4]),
    "on a ranking, full": (f"{ON_A_RANKING} --update full", 1, 5, [4, 0]),
    "on a ranking, full, in a control": (f"{ON_A_RANKING} --update full", 2, 5, [4]),
}
FIRST_LOOK = ("lora", "rank first", "until stable")  # the others are in the long tier
PARAMETERS = [
    pytest.param(*case, id=name, marks=() if name in FIRST_LOOK else pytest.mark.long)
    for name, case in CASES.items()
]


def watch(monkeypatch, stop_at=None, of=1):
    """The steps before which trainings begin, from now on.

    What Ctrl-C raises is raised after step `stop_at` of training number `of`.
    """
    first_steps = []
    on_train_begin, on_step_end = Checkpoints.on_train_begin, Checkpoints.on_step_end

    def begin(self, args, state, control, **kwargs):
        first_steps.append(state.global_step)
        on_train_begin(self, args, state, control, **kwargs)

    def step(self, args, state, control, **kwargs):
        if len(first_steps) == of and state.global_step == stop_at:
            raise KeyboardInterrupt
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(Checkpoints, "on_train_begin", begin)
    monkeypatch.setattr(Checkpoints, "on_step_end", step)
    return first_steps


@pytest.mark.parametrize(("command", "of", "at", "expected"), PARAMETERS)
def test_a_stopped_run_goes_on_bit_for_bit(
    tiny, preferences, ranked, tmp_path, monkeypatch, capsys, command, of, at, expected
):
    files = {"model": tiny / "model", "data": tiny / "data.jsonl", "ranked": ranked}
    files |= {name: preferences / f"{name}.jsonl" for name in ("pairs", "rated")}
    words = [*(word.format(**files) for word in command.split()), *SMALL, "--output", "out"]
    if "--ranking" not in words:
        words += ["--mask-batches", "2"]
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "broken":
            with monkeypatch.context() as patched:
                watch(patched, at, of)
                assert keylayers(*words) == 130
            first_steps = watch(monkeypatch)
        assert keylayers(*words) == 0
    assert differences(contents(tmp_path / "whole"), contents(tmp_path / "broken")) == []
    assert first_steps == expected
    if words[0] == "rank":
        assert "stage 1, training all modules: continues after step 4" in capsys.readouterr().err


def test_a_finished_training_of_the_same_inputs_is_taken(tiny, tmp_path, monkeypatch, capsys):
    inputs = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--output", tmp_path / "t")
    arguments = ("train", *inputs, *TRAIN, *SMALL, "--mask-batches", "2")
    assert keylayers(*arguments) == 0
    first, table = contents(tmp_path / "t"), capsys.readouterr().out
    first_steps = watch(monkeypatch)
    assert keylayers(*arguments) == 0
    assert differences(first, contents(tmp_path / "t")) == []
    out, err = capsys.readouterr()
    assert out == table
    assert "the training of the same inputs is taken from" in err
    assert first_steps == []
    assert keylayers(*arguments, "--seed", "1") == 0  # other inputs
    assert first_steps == [0]


def test_checkpoints_of_other_inputs_and_half_written_ones_are_not_gone_on_from(tmp_path):
    mark = '{{"inputs_sha256": "{}", "seconds": 3.0}}'.format
    marks = {"2": mark("a"), "10": mark("a"), "20": mark("b"), "30": None, "40": "{"}
    for step, text in marks.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text is not None:
            (tmp_path / f"checkpoint-{step}" / RECORD).write_text(text)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / RECORD).write_text(mark("a"))
    found = Checkpoints(tmp_path, "a")
    assert (found.last, found.last_step) == (tmp_path / "checkpoint-10", 10)
    assert found.seconds >= 3.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]
    assert Checkpoints(tmp_path / "nowhere", "a").last is None
