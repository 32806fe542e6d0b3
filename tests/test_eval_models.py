# SPDX-License-Identifier: Apache-2.0
"""The models of `keylayers eval`: one in memory at a time, equal ones, their names and training."""

import gc
import weakref

import pandas as pd
import pytest

from commands import keylayers
from eval_files import LOSSES, TASKS
from tiny_files import ANIMALS, FOODS


def test_each_model_is_gone_from_memory_before_the_next_is_loaded(place, tmp_path, monkeypatch):
    from keylayers.evaluation import subjects

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


def test_equal_models_have_rows_each(place, tmp_path):
    arguments = ["--model", "model", "--checkpoint", "model", *LOSSES, "--output", tmp_path / "out"]
    for _ in range(2):
        assert keylayers("eval", *arguments) == 0
        table = pd.read_parquet(tmp_path / "out" / "documents.parquet")
        wide = table.pivot(index=["task", "document"], columns="model", values="value")
        assert list(wide) == ["base model", "model"]
        assert wide.notna().all(axis=None)
        assert (wide["base model"] == wide["model"]).all()


@pytest.mark.parametrize(("trained", "template"), [("trained", "model"), ("stage 1", "chatml")])
def test_training_in_another_chat_template_is_said(place, tmp_path, capsys, trained, template):
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


def test_the_base_model_is_the_same_after_each_adapter(place):
    from keylayers.evaluation.options import ComparedOptions
    from keylayers.evaluation.subjects import each_model
    from keylayers.model.loading import load_model
    from keylayers.model.options import ModelOptions
    from keylayers.model.weights import weights_sha256

    source = ModelOptions(model=str(place / "model"))
    compared = ComparedOptions(adapter=(str(place / "other"), str(place / "adapter")))
    hashes = []
    for loaded in each_model(source, compared, None):
        if loaded.kind == "base":
            model, names = loaded.model, [name for name, _ in loaded.model.named_modules()]
        hashes.append(loaded.identity)
    assert weights_sha256(model) == weights_sha256(load_model(source))
    assert [name for name, _ in model.named_modules()] == names
    assert not hasattr(model, "peft_config")
    assert len(set(hashes)) == 3


def test_names_tell_models_apart_and_none_takes_that_of_the_base():
    from keylayers.errors import ConfigError
    from keylayers.evaluation.subjects import unique_names

    def names(*sources):
        return ["base model", *unique_names(sources).values()]

    assert names("runs/a", "runs/b") == ["base model", "a", "b"]
    assert names("a/out", "b/out") == ["base model", "a/out", "b/out"]
    assert names("owner/model", "x/base model") == ["base model", "owner/model", "x/base model"]
    with pytest.raises(ConfigError, match="'base model' has that of another"):
        names("base model")


def test_a_model_with_another_tokenizer_is_not_compared_by_losses(place, tmp_path, capsys):
    from transformers import AutoTokenizer

    (tmp_path / "tuned").mkdir()
    for path in (place / "tuned").iterdir():
        (tmp_path / "tuned" / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(place / "tuned")
    tokenizer.add_tokens([f"{one[-1]} eat" for one in (*ANIMALS, *FOODS)])
    tokenizer.save_pretrained(tmp_path / "tuned")
    arguments = ["--model", "model", "--checkpoint", tmp_path / "tuned", "--data", "data.jsonl"]
    assert keylayers("eval", *arguments, "--output", tmp_path / "out") == 2
    assert "only between models of one tokenizer" in capsys.readouterr().err


def test_training_on_another_split_is_said(place, tmp_path, capsys):
    """Then the adapter may have seen what counts as held out here."""
    out = tmp_path / "rank"
    data = ["--model", "model", "--data", "data.jsonl", "--max-length", "32", "--held-out", "5"]
    small = ["--max-steps", "2", "--batch-size", "4", "--mask-batches", "1"]
    assert keylayers("rank", *data, *small, "--output", out) == 0
    arguments = ["--adapter", out / "adapter", "--output", tmp_path / "one"]
    assert keylayers("eval", *data, *arguments) == 0
    assert "another split" not in capsys.readouterr().out
    arguments[-1] = tmp_path / "two"
    assert keylayers("eval", *data[:-1], "7", *arguments) == 0
    assert "adapter was trained on other data or another split" in capsys.readouterr().out
