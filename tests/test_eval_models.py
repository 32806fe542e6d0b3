# SPDX-License-Identifier: Apache-2.0
"""The models of `keylayers eval`: what tells them apart, their memory, how they were trained."""

import gc
import json
import shutil
import weakref

import pandas as pd
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from commands import keylayers
from eval_files import LOSSES, TASKS, evaluation_of
from keylayers.errors import ConfigError
from keylayers.evaluation import subjects
from keylayers.evaluation.options import ComparedOptions
from keylayers.model.loading import load_model
from keylayers.model.options import ModelOptions
from keylayers.model.weights import weights_sha256

FORGETTING = ["--forgetting-data", "known.txt", "--max-length", "32"]


def test_each_model_is_gone_from_memory_before_the_next_is_loaded(said, monkeypatch):
    models, num_alive = [], []

    def watched(source):
        num_alive.append(sum(one() is not None for one in models))
        model = load_model(source)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(subjects, "load_model", watched)
    arguments = ["--model", "model", "--adapter", "adapter", "--checkpoint", "tuned", "model"]
    gc.disable()  # else it may happen to run in between
    try:
        said(*arguments, *TASKS, *LOSSES, "--limit", "2")
    finally:
        gc.enable()
    assert num_alive == [0, 0, 0]


def test_equal_models_have_rows_each(said, tmp_path):
    for _ in range(2):
        said("--model", "model", "--checkpoint", "model", *LOSSES)
        table = pd.read_parquet(tmp_path / "out" / "documents.parquet")
        wide = table.pivot(index=["task", "document"], columns="model", values="value")
        assert list(wide) == ["base model", "model"]
        assert wide.notna().all(axis=None)
        assert (wide["base model"] == wide["model"]).all()


def test_the_base_model_is_the_same_after_each_adapter(place):
    compared = ComparedOptions(adapter=(str(place / "other"), str(place / "adapter")))
    source, identities = ModelOptions(model=str(place / "model")), set()
    for loaded in subjects.each_model(source, compared, None):
        if loaded.kind == "base":
            model, names = loaded.model, [name for name, _ in loaded.model.named_modules()]
        identities.add(loaded.identity)
    assert weights_sha256(model) == weights_sha256(load_model(source))
    assert [name for name, _ in model.named_modules()] == names
    assert not hasattr(model, "peft_config")
    assert len(identities) == 3


NAMES = {
    ("runs/a", "runs/b"): ["a", "b"],
    ("a/out", "b/out"): ["a/out", "b/out"],
    ("owner/model", "x/base model"): ["owner/model", "x/base model"],
}


def test_names_tell_models_apart_and_none_takes_that_of_the_base():
    for sources, names in NAMES.items():
        assert list(ComparedOptions(checkpoint=sources).names.values()) == names
    with pytest.raises(ConfigError, match="'base model' is taken"):
        ComparedOptions(checkpoint=("base model",))


@pytest.fixture
def copy(place, tmp_path):
    """A copy of the model, to be changed."""
    return shutil.copytree(place / "model", tmp_path / "copy")


CHANGES = {  # of a model's or its tokenizer's attributes
    "rope": lambda model, _: model.config.rope_parameters.update(rope_theta=5.0),
    "infinite": lambda model, _: setattr(model.config, "time_step_limit", (0.0, float("inf"))),
    "generation": lambda model, _: setattr(model.generation_config, "no_repeat_ngram_size", 2),
    "end": lambda model, _: setattr(model.generation_config, "eos_token_id", [2, 7]),
    "vocabulary": lambda _, tokenizer: tokenizer.add_tokens(["new"]),
    "special": lambda _, tokenizer: setattr(tokenizer, "eos_token", "<s>"),
}


def test_what_changes_results_changes_the_hash_but_neither_place_nor_use(place, copy):
    def loaded(folder):
        return (AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))

    found = set()
    for folder in (place / "model", copy):
        model, tokenizer = loaded(folder)
        found.add(subjects.config_sha256(model, tokenizer))
        tokenizer(["one", "one two"], padding=True, truncation=True, max_length=9)
        found.add(subjects.config_sha256(model, tokenizer))
    assert len(found) == 1
    for change in CHANGES.values():
        model, tokenizer = loaded(copy)
        change(model, tokenizer)
        found.add(subjects.config_sha256(model, tokenizer))
        assert subjects.config_sha256(model, tokenizer) in found
    assert len(found) == 1 + len(CHANGES)


def test_models_that_differ_in_their_config_alone_are_two_models(said, copy, tmp_path):
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 2}
    (copy / "config.json").write_text(json.dumps(config))

    def losses(*models):
        said(*models, *FORGETTING)
        (measure,) = evaluation_of(tmp_path / "out").measures
        return [one.value for one in measure.results]

    (alone,) = losses("--model", copy)
    base, again = losses("--model", "model", "--checkpoint", copy)
    assert again == alone
    assert abs(again - base) > 1e-3


SMALL = ["--max-steps", "2", "--batch-size", "4", "--mask-batches", "1"]


@pytest.mark.parametrize(("template", "other"), [("model", "alpaca"), ("chatml", "model")])
def test_training_on_another_split_or_in_another_chat_template_is_said(
    tmp_path, said, template, other
):
    given, elsewhere = (
        [] if name == "model" else ["--chat-template", name] for name in (template, other)
    )
    data = ["--model", "model", "--data", "data.jsonl", "--max-length", "64", "--held-out", "5"]
    assert keylayers("rank", *data, *given, *SMALL, "--output", tmp_path / "rank") == 0
    source = tmp_path / "rank" / "adapter"  # of stage 1, or else of a training of its own
    if template == "model":
        source = tmp_path / "adapter"
        train = ["--ranking", tmp_path / "rank", "--budget", "3", "--steps", "1"]
        assert keylayers("train", *train, "--output", source) == 0
    text = f"adapter was trained in the chat template {template!r}, but is measured in {other!r}"
    tasks = ["--model", "model", "--task-folder", "tasks", "--tasks", "three", "--limit", "2"]
    for measured in (data, [*tasks, "--apply-chat-template"]):
        assert text in said("--adapter", source, *measured, *elsewhere)[0]
        same, _ = said("--adapter", source, *measured, *given)
        assert "chat template" not in same
        assert "another split" not in same
    assert "chat template" not in said("--adapter", source, "--model", "model", *FORGETTING)[0]
    # Then the adapter may have seen what counts as held out here.
    shown, _ = said("--adapter", source, *data[:-1], "7", *given)
    assert "adapter was trained on other data or another split" in shown
