# SPDX-License-Identifier: Apache-2.0
"""The models of `keylayers eval`: one in memory at a time, equal ones, their names and training."""

import gc
import weakref

import pandas as pd
import pytest

from commands import keylayers
from eval_files import LOSSES, TASKS, write_place


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A folder with all that is evaluated."""
    folder = tmp_path_factory.mktemp("eval")
    write_place(tiny, folder)
    return folder


def test_each_model_is_gone_from_memory_before_the_next_is_loaded(place, tmp_path, monkeypatch):
    from keylayers.evaluation import subjects

    monkeypatch.chdir(place)
    load, models, num_alive = subjects.load_model, [], []

    def watched(source):
        num_alive.append(sum(one() is not None for one in models))
        model = load(source)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(subjects, "load_model", watched)
    arguments = ["--model", "model", "--adapter", "adapter", "--checkpoint", "tuned", "model"]
    measured = [*TASKS, *LOSSES, "--limit", "2"]
    gc.disable()  # else it may happen to run in between
    try:
        assert keylayers("eval", *arguments, *measured, "--output", tmp_path / "out") == 0
    finally:
        gc.enable()
    assert num_alive == [0, 0, 0]


def test_equal_models_have_rows_each(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    arguments = ["--model", "model", "--checkpoint", "model", *LOSSES, "--output", tmp_path / "out"]
    for _ in range(2):
        assert keylayers("eval", *arguments) == 0
        table = pd.read_parquet(tmp_path / "out" / "documents.parquet")
        wide = table.pivot(index=["task", "document"], columns="model", values="value")
        assert list(wide) == ["base model", "model"]
        assert wide.notna().all(axis=None)
        assert (wide["base model"] == wide["model"]).all()


def test_no_model_takes_the_name_of_the_base():
    from keylayers.errors import ConfigError
    from keylayers.evaluation.options import ComparedOptions
    from keylayers.evaluation.subjects import subjects_of
    from keylayers.model.options import ModelOptions

    with pytest.raises(ConfigError, match="'base model' has that of another"):
        subjects_of(ModelOptions(model="m"), ComparedOptions(adapter=("base model",)))


@pytest.mark.parametrize(("trained", "template"), [("trained", "model"), ("stage 1", "chatml")])
def test_training_in_another_chat_template_is_said(
    place, tmp_path, monkeypatch, capsys, trained, template
):
    monkeypatch.chdir(place)
    given = [] if template == "model" else ["--chat-template", template]
    data = ["--model", "model", "--data", "data.jsonl", "--max-length", "64", "--held-out", "5"]
    small = ["--max-steps", "2", "--batch-size", "4", "--mask-batches", "1"]
    assert keylayers("rank", *data, *given, *small, "--output", tmp_path / "rank") == 0
    source = tmp_path / "rank" / "adapter"
    if trained == "trained":
        source = tmp_path / "adapter"
        train = ["--ranking", tmp_path / "rank" / "ranking.json", "--budget", "3", "--steps", "1"]
        assert keylayers("train", *train, "--output", source) == 0

    def said(name, *more):
        capsys.readouterr()
        assert keylayers("eval", "--adapter", source, *more, "--output", tmp_path / name) == 0
        return " ".join(capsys.readouterr().out.split())

    other = "alpaca" if template == "model" else "model"
    text = f"adapter was trained in the chat template {template!r}, but is measured in {other!r}"
    elsewhere = ["--chat-template", "alpaca"] if template == "model" else []
    asked = ["--model", "model", "--task-folder", "tasks", "--tasks", "three", "--limit", "2"]
    for name, measured in (("loss", data), ("tasks", [*asked, "--apply-chat-template"])):
        assert text in said(f"{name}-other", *measured, *elsewhere)
        assert "chat template" not in said(f"{name}-same", *measured, *given)
    known = ["--model", "model", "--forgetting-data", "known.txt", "--max-length", "32"]
    assert "chat template" not in said("none", *known)
