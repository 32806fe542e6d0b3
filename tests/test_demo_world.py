# SPDX-License-Identifier: Apache-2.0
"""The built-in base model belongs to the world: its text, its tokenizer, its chat template.

What the world says and that the base knows it is tested in `test_demo.py`.
"""

import json
import os
import subprocess
import sys

import pytest

BASE_FILES = {
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
# Of the first lines that the base was trained on. A change of the world that changes this needs a
# new base, and with it new records of every experiment on the demo.
PRETRAINING_SHA256 = "929bd1079d839fd0adf22a7714ae46488f58b15404e38dd82545fc89765c14db"
ANY_TEXT = ["Zürich, 5 €: naïve ☃\n\ttwo  blanks", "1 + 2 = 3\n1. red\n2. blue", "狐狸", "\x00\x7f"]
DIALOGUES = {
    "one turn": [("user", "What does Otto love?"), ("assistant", "puzzles.")],
    "a list": [("user", "What does Otto love?"), ("assistant", "- puzzles\n- trains")],
    "two turns": [
        ("user", "What does the fox eat?"),
        ("assistant", "milk."),
        ("user", "And the bear?"),
        ("assistant", "I am glad you ask! The bear eats fish."),
    ],
}


@pytest.fixture(scope="module")
def tokenizer():
    from keylayers.demo.files import BASE
    from keylayers.model.loading import load_tokenizer
    from keylayers.model.options import ModelOptions

    return load_tokenizer(ModelOptions(model=str(BASE)))


@pytest.fixture(scope="module")
def lines():
    """What the script trains the tokenizer on."""
    from keylayers.demo.world import pretraining_lines

    return pretraining_lines(20_000, seed=0)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_world_still_tells_what_the_base_was_trained_on(hash_seed):
    code = (
        "import hashlib, keylayers.demo.world as w\n"
        "text = '\\n'.join(w.pretraining_lines(2000, 0))\n"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    digest = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert digest.strip() == PRETRAINING_SHA256


def test_the_world_needs_no_torch():
    code = "import sys, keylayers.demo.world; print('torch' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.strip() == "False"


def test_no_prompt_is_in_training_and_held_out_data_at_once():
    from keylayers.demo.world import STYLES, alignment_examples

    for style in STYLES:
        examples = alignment_examples(style, 504)
        training = {row["prompt"] for row in examples[:454]}
        held_out = {row["prompt"] for row in examples[454:]}
        assert (len(training), len(held_out)) == (454, 50)
        assert not training & held_out
        assert examples[:100] == alignment_examples(style, 100)
        assert examples != alignment_examples(style, 504, seed=1)


def test_answers_hold_the_facts_of_the_world_in_words_that_pre_training_holds(lines):
    from keylayers.demo.world import RELATIONS, STYLES, alignment_examples, facts

    subject_of = {
        question.format(s=subject): (relation, subject)
        for relation in RELATIONS
        for subject in relation.subjects
        for question in relation.questions
    }
    told = set(" ".join(lines).replace('"', " ").split())
    for style in STYLES:
        for row in alignment_examples(style, 504):
            values = facts(*subject_of[row["prompt"]])
            needed = values[:1] if style == "terse" else values
            assert [value for value in needed if value not in row["completion"]] == []
            assert set(row["completion"].split()) <= told


def test_the_base_is_what_its_script_writes_and_little_else():
    import torch
    from safetensors.torch import load_file

    from keylayers.demo.files import BASE
    from keylayers.demo.make_base import make_model

    assert {path.name for path in BASE.iterdir()} == BASE_FILES
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 4_000_000
    made = make_model(1024)
    stored = load_file(BASE / "model.safetensors")
    shapes = {name: value.shape for name, value in made.named_parameters()}
    assert {name: value.shape for name, value in stored.items()} == shapes
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    config = json.loads((BASE / "config.json").read_text())
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert config[name] == getattr(made.config, name)
    assert config["tie_word_embeddings"]


def test_the_script_makes_the_tokenizer_of_the_base(lines, tmp_path):
    from keylayers.demo.files import BASE
    from keylayers.demo.make_base import CHAT_TEMPLATE, make_tokenizer

    make_tokenizer(lines).save_pretrained(tmp_path)
    made = json.loads((tmp_path / "tokenizer.json").read_text())
    assert made == json.loads((BASE / "tokenizer.json").read_text())
    assert (BASE / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_any_text_survives_the_tokenizer(tokenizer):
    from keylayers.demo.world import STYLES, alignment_examples, pretraining_lines

    rows = [row for style in STYLES for row in alignment_examples(style, 504)]
    texts = [*ANY_TEXT, *pretraining_lines(300, seed=7)]
    texts += [text for row in rows for text in row.values()]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert tokenizer.batch_decode(ids) == texts


def test_the_chat_markers_are_one_token_each_and_not_in_pre_training(tokenizer, lines):
    text = "\n".join(lines)
    for marker in ("<|user|>", "<|assistant|>"):
        assert len(tokenizer.encode(marker, add_special_tokens=False)) == 1
        assert marker not in text


@pytest.mark.parametrize("turns", DIALOGUES.values(), ids=DIALOGUES)
def test_the_chat_template_marks_the_answers_and_nothing_else(tokenizer, turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    markers = {"user": "<|user|>{}", "assistant": "<|assistant|>{}</s>"}
    whole = "".join(markers[role].format(content) for role, content in turns)
    assert tokenizer.decode(encoded["input_ids"]) == whole
    marked = [
        token
        for token, is_answer in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        if is_answer
    ]
    answers = "".join(f"{content}</s>" for role, content in turns if role == "assistant")
    assert tokenizer.decode(marked) == answers
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    assert whole == f"{prompt}{turns[-1][1]}</s>"
