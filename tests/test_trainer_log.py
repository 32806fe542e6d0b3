# SPDX-License-Identifier: Apache-2.0
"""`report_to`: the trainer's own loggers are told of scores, gates and losses, and nobody else."""

import math

import pytest
from transformers import TrainerCallback

import keylayers
from commands import complaint, rank, read
from keylayers.scores.scoring_options import scoring_options
from keylayers.trainers import log
from trainers import build

pytest.importorskip("tensorboard")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
NUM_STEPS = 7


class Ear(TrainerCallback):
    """A callback of a user: it takes every log for one of training."""

    logs = ()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs += (logs,)


def events(folder):
    """Name of a curve -> step -> value, of all files below `folder`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in sorted({file.parent for file in folder.rglob("events.out.*")}):
        reader = EventAccumulator(str(path), size_guidance={"scalars": 0})
        reader.Reload()
        for name in reader.Tags()["scalars"]:
            curve = found.setdefault(name, {})
            curve |= {point.step: point.value for point in reader.Scalars(name)}
    return found


def trainer_with_log(folder, monkeypatch, *, is_trained=False):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder))
    more = {"report_to": ["tensorboard"], "logging_strategy": "steps", "logging_steps": 1}
    return build("SFT", "config", is_trained=is_trained, **more)


def learned(trainer):
    return keylayers.rank_modules(trainer, "ila", mask_steps=NUM_STEPS)


@pytest.mark.parametrize("is_trained", [True, False])
def test_every_step_of_learned_scores_and_gates_is_a_point(tmp_path, monkeypatch, is_trained):
    trainer = trainer_with_log(tmp_path, monkeypatch, is_trained=is_trained)
    ear = Ear()
    trainer.add_callback(ear)
    state = dict(vars(trainer.state))
    ranking = learned(trainer)
    assert vars(trainer.state) == state
    assert ear.logs == ()
    curves = events(tmp_path)
    for module in ranking.modules:
        scores = curves[f"train/mask_score/{module.name}"]
        assert list(scores) == list(range(1, NUM_STEPS + 1))
        assert scores[NUM_STEPS] == pytest.approx(module.score)
        gates = {step: 1 / (1 + math.exp(-score)) for step, score in scores.items()}
        assert curves[f"train/mask_gate/{module.name}"] == pytest.approx(gates)
    losses = list(curves["train/mask_loss"].values())
    assert losses == pytest.approx(ranking.provenance["mask"]["losses"])
    without = learned(build("SFT", "config", is_trained=is_trained))
    assert without.modules == ranking.modules


def test_a_mask_inside_a_run_leaves_the_curves_of_training_whole(tmp_path, monkeypatch):
    trainer = trainer_with_log(tmp_path, monkeypatch)
    trainer.args.max_steps = 6
    method = scoring_options("ila", mask_steps=NUM_STEPS, granularity="block")
    trainer.add_callback(keylayers.FreezeUnimportant(method=method, max_steps=3))
    trainer.train()
    curves = events(tmp_path)
    assert list(curves["train/loss"]) == [1, 2, 3, 4, 5, 6]
    assert list(curves["train/mask_loss"]) == list(range(1, NUM_STEPS + 1))
    gates = {name for name in curves if name.startswith("train/mask_gate/")}
    assert gates == {f"train/mask_gate/block {index}" for index in range(3)}


def test_the_command_line_logs_both_stages(tiny, tmp_path, monkeypatch):
    """Methods without steps tell the loss of each pass, and the scores once."""
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    log._folder.cache_clear()
    assert rank(tiny, tmp_path / "out", "--report-to", "tensorboard") == 0
    log._folder.cache_clear()
    ranking = read(tmp_path / "out")
    training = events(tmp_path / "runs" / "stage-1")["train/loss"]
    stage_1, mask = (ranking["provenance"][part]["losses"] for part in ("stage_1", "mask"))
    assert list(training.values()) == pytest.approx(stage_1)
    scoring = events(tmp_path / "runs" / "stage-2")
    assert list(scoring["train/mask_loss"].values()) == pytest.approx(mask)
    for module in ranking["modules"]:
        found = scoring[f"train/mask_score/{module['name']}"]
        assert found == {len(mask): pytest.approx(module["score"])}
    assert not any("mask_gate" in name for name in scoring)


def test_an_unknown_logger_is_refused_with_the_nearest_name(tiny, tmp_path, capsys):
    assert rank(tiny, tmp_path / "out", "--report-to", "tensorbord") == 2
    line = complaint(capsys)
    assert "`report_to` must be among azure_ml, " in line
    assert "got 'tensorbord', did you mean 'tensorboard'?" in line
    assert not (tmp_path / "out").exists()
