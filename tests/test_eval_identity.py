# SPDX-License-Identifier: Apache-2.0
"""Which model was measured: its weights, and what decides results beside them."""

import json

import pytest

from commands import keylayers
from eval_files import evaluation_of, write_place
from tiny_files import tiny_model, tiny_tokenizer


def hashed(model, tokenizer):
    from keylayers.evaluation.subjects import config_sha256

    return config_sha256(model, tokenizer)


@pytest.fixture
def model():
    return tiny_model(len(tiny_tokenizer()))


def test_a_copy_elsewhere_has_the_same_hash_and_so_has_a_tokenizer_in_use(model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    found = []
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        copy = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        found.append(hashed(copy, tokenizer))
        tokenizer(["one", "one two"], padding=True, truncation=True, max_length=9)
        found.append(hashed(copy, tokenizer))
    assert len(set(found)) == 1


def change_rope(model, tokenizer):
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 5.0}


def change_infinite(model, tokenizer):
    model.config.time_step_limit = (0.0, float("inf"))


def change_generation(model, tokenizer):
    model.generation_config.no_repeat_ngram_size = 2


def change_end(model, tokenizer):
    model.generation_config.eos_token_id = [2, 7]


def change_vocabulary(model, tokenizer):
    tokenizer.add_tokens(["new"])


def change_special(model, tokenizer):
    tokenizer.eos_token = "<s>"


CHANGES = (
    *(change_rope, change_infinite, change_generation, change_end),
    *(change_vocabulary, change_special),
)


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_results_changes_the_hash(model, change):
    tokenizer = tiny_tokenizer()
    before = hashed(model, tokenizer)
    assert hashed(model, tokenizer) == before
    change(model, tokenizer)
    assert hashed(model, tokenizer) != before


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def place(tiny, tmp_path, monkeypatch):
    """A copy of the model to edit, and a folder with all that is evaluated."""
    shared = tmp_path / "place"
    shared.mkdir()
    write_place(tiny, shared)
    monkeypatch.chdir(shared)
    (shared / "copy").mkdir()
    for path in (shared / "model").iterdir():
        (shared / "copy" / path.name).write_bytes(path.read_bytes())
    return shared


def losses(place):
    (measure,) = evaluation_of(place / "out").measures
    return [one.value for one in measure.results]


def test_models_that_differ_in_their_config_alone_are_two_models(place):
    edit(place / "copy" / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 2})
    forgetting = ["--forgetting-data", "known.txt", "--max-length", "32"]
    assert keylayers("eval", "--model", "copy", *forgetting, "--output", "out") == 0
    (alone,) = losses(place)
    arguments = ["--model", "model", "--checkpoint", "copy", *forgetting]
    assert keylayers("eval", *arguments, "--output", "out") == 0
    base, copy = losses(place)
    assert copy == alone
    assert abs(copy - base) > 1e-3


def test_other_settings_of_generation_are_another_model(place, capsys):
    arguments = ["eval", "--model", "copy", "--task-folder", "tasks", "--tasks", "written"]
    arguments += ["--output", "out"]
    assert keylayers(*arguments) == 0
    assert keylayers(*arguments) == 0
    assert "all measured before" in capsys.readouterr().err
    edit(place / "copy" / "generation_config.json", eos_token_id=[2, 9])
    assert keylayers(*arguments) == 0
    assert "measured before" not in capsys.readouterr().err
