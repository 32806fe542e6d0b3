# SPDX-License-Identifier: Apache-2.0
"""`report_to`: the trainer's own loggers are told of scores, gates and losses, and nobody else."""

import math

import pytest
from transformers import TrainerCallback

import keylayers
from commands import complaint, rank, read
from keylayers.scores.scoring_options import scoring_options
from keylayers.training import loggers
from trainers import build

pytest.importorskip("tensorboard")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
NUM_STEPS = 7


class Ear(TrainerCallback):
    """A callback of a user: it takes every log for one of training."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)


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


def rank_with(trainer, method):
    few = {"mask_steps": NUM_STEPS} if method == "ila" else {"mask_batches": 2}
    return keylayers.rank_modules(trainer, method, **few)


@pytest.mark.parametrize("is_trained", [True, False])
def test_every_step_of_learned_scores_and_gates_is_a_point(tmp_path, monkeypatch, is_trained):
    trainer = trainer_with_log(tmp_path, monkeypatch, is_trained=is_trained)
    ear = Ear()
    trainer.add_callback(ear)
    state = dict(vars(trainer.state))
    ranking = rank_with(trainer, "ila")
    assert vars(trainer.state) == state
    assert ear.logs == []
    curves = events(tmp_path)
    for module in ranking.modules:
        scores = curves[f"train/mask_score/{module.name}"]
        gates = curves[f"train/mask_gate/{module.name}"]
        assert list(scores) == list(gates) == list(range(1, NUM_STEPS + 1))
        assert scores[NUM_STEPS] == pytest.approx(module.score)
        for step in scores:
            assert gates[step] == pytest.approx(1 / (1 + math.exp(-scores[step])))
    losses = list(curves["train/mask_loss"].values())
    assert losses == pytest.approx(ranking.provenance["mask"]["losses"])
    without = rank_with(build("SFT", "config", is_trained=is_trained), "ila")
    assert without.modules == ranking.modules


def test_other_methods_tell_the_loss_of_each_pass_and_the_scores_once(tmp_path, monkeypatch):
    trainer = trainer_with_log(tmp_path, monkeypatch)
    ranking = rank_with(trainer, "elimination")
    curves = events(tmp_path)
    losses = ranking.provenance["mask"]["losses"]
    for module in ranking.modules:
        found = curves[f"train/mask_score/{module.name}"]
        assert found == {len(losses): pytest.approx(module.score)}
    assert list(curves["train/mask_loss"].values()) == pytest.approx(losses)
    assert not any("mask_gate" in name for name in curves)


def test_gates_of_whole_blocks_have_the_names_of_the_gates(tmp_path, monkeypatch):
    trainer = trainer_with_log(tmp_path, monkeypatch)
    keylayers.rank_modules(trainer, method="ila", mask_steps=2, granularity="block")
    gates = {name for name in events(tmp_path) if name.startswith("train/mask_gate/")}
    assert gates == {f"train/mask_gate/block {index}" for index in range(3)}


def test_a_mask_inside_a_run_leaves_the_curves_of_training_whole(tmp_path, monkeypatch):
    trainer = trainer_with_log(tmp_path, monkeypatch)
    trainer.args.max_steps = 6
    trainer.add_callback(
        keylayers.FreezeUnimportant(
            method=scoring_options("ila", mask_steps=NUM_STEPS), max_steps=3
        )
    )
    trainer.train()
    curves = events(tmp_path)
    assert list(curves["train/loss"]) == [1, 2, 3, 4, 5, 6]
    assert list(curves["train/mask_loss"]) == list(range(1, NUM_STEPS + 1))


def test_the_command_line_logs_both_stages(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    loggers._folder.cache_clear()
    assert rank(tiny, tmp_path / "out", "--report-to", "tensorboard") == 0
    loggers._folder.cache_clear()
    made_by = read(tmp_path / "out")["provenance"]
    training = events(tmp_path / "runs" / "stage-1")["train/loss"]
    assert list(training.values()) == pytest.approx(made_by["stage_1"]["losses"])
    scoring = events(tmp_path / "runs" / "stage-2")["train/mask_loss"]
    assert list(scoring.values()) == pytest.approx(made_by["mask"]["losses"])


def test_an_unknown_logger_is_refused_with_the_nearest_name(tiny, tmp_path, capsys):
    assert rank(tiny, tmp_path / "out", "--report-to", "tensorbord") == 2
    line = complaint(capsys)
    assert "`report_to` must be among azure_ml, " in line
    assert "got 'tensorbord', did you mean 'tensorboard'?" in line
    assert not (tmp_path / "out").exists()
