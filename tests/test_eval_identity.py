# SPDX-License-Identifier: Apache-2.0
"""Which model was measured: its weights, and what decides results beside them."""

import pytest

from tiny_files import tiny_model, tiny_tokenizer


def hashed(model, tokenizer):
    from keylayers.evaluation.identity import config_sha256

    return config_sha256(model.config.to_dict(), model.generation_config.to_dict(), tokenizer)


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
