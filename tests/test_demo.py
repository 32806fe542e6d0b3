# SPDX-License-Identifier: Apache-2.0
"""The demo's made-up world, and the built-in base model that was made of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from commands import keylayers
from keylayers.demo.world import BASE, RELATIONS, STYLES, alignment_examples, facts

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "base"
sys.path.append(str(RECIPE))
from make_base import CHAT_TEMPLATE, make_model, make_tokenizer  # noqa: E402
from prose import pretraining_lines  # noqa: E402

BASE_FILES = (
    "chat_template.jinja config.json generation_config.json model.safetensors tokenizer.json "
    "tokenizer_config.json"
)
WORLD = """
import hashlib, sys
import keylayers.demo.world as world
from prose import pretraining_lines
for text in (
    "\\n".join(pretraining_lines(2000, 0)),
    repr([world.alignment_examples(style, 504, 2) for style in world.STYLES]),
):
    print(hashlib.sha256(text.encode()).hexdigest())
print("torch" in sys.modules)
"""
# Of the first lines that the base was trained on. A change of the world that changes this needs a
# new base, and with it new records of every experiment on the demo.
PRETRAINING_SHA256 = "929bd1079d839fd0adf22a7714ae46488f58b15404e38dd82545fc89765c14db"
ANY_TEXT = ["Zürich, 5 €: naïve ☃\n\ttwo  blanks", "1 + 2 = 3\n1. red\n2. blue", "狐狸", "\x00\x7f"]
DIALOGUE = [
    ("user", "What does the fox eat?"),
    ("assistant", "- milk\n- eggs"),
    ("user", "And the bear?"),
    ("assistant", "I am glad you ask! The bear eats fish."),
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def lines():
    """What the script trains the tokenizer on."""
    return pretraining_lines(20_000, seed=0)


@pytest.fixture(scope="module")
def examples():
    return {style: alignment_examples(style, 504) for style in STYLES}


def test_the_world_is_what_the_base_was_trained_on_whatever_the_hash_seed_and_needs_no_torch():
    first, second = (
        subprocess.check_output(
            [sys.executable, "-c", WORLD],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"src:{RECIPE}"},
            text=True,
        ).split()
        for seed in ("1", "2")
    )
    assert first == second
    assert (first[0], first[2]) == (PRETRAINING_SHA256, "False")


def test_facts_are_three():
    for relation in RELATIONS:
        found = [facts(relation, subject) for subject in relation.subjects]
        assert {len({*values} & {*relation.values}) for values in found} == {3}
    assert len({facts(RELATIONS[0], animal) for animal in RELATIONS[0].subjects}) > 15


def test_styles_ask_the_same_questions_once_and_answer_differently(examples):
    for style, rows in examples.items():
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in examples["polite"]]
        assert len({row["prompt"] for row in rows}) == 504
        assert rows[:100] == alignment_examples(style, 100)
        assert rows != alignment_examples(style, 504, seed=1)
    for rows in zip(*examples.values(), strict=True):
        polite, listed, terse = (row["completion"] for row in rows)
        assert len({polite, listed, terse}) == 3
        assert polite.endswith("helps you.")
        assert listed.count("- ") == 3
        assert "I hope" not in terse


def test_answers_hold_the_facts_of_the_world_in_words_that_pre_training_holds(examples, lines):
    subject_of = {
        question.format(s=subject): (relation, subject)
        for relation in RELATIONS
        for subject in relation.subjects
        for question in relation.questions
    }
    told = set(" ".join(lines).replace('"', " ").split())
    for style, rows in examples.items():
        for row in rows:
            values = facts(*subject_of[row["prompt"]])
            needed = values[:1] if style == "terse" else values
            assert [value for value in needed if value not in row["completion"]] == []
            assert set(row["completion"].split()) <= told


def test_the_base_is_what_its_script_writes_and_little_else():
    assert {path.name for path in BASE.iterdir()} == set(BASE_FILES.split())
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


def test_the_base_knows_its_world(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    losses = []
    for line in pretraining_lines(40, seed=99):  # unseen lines about known facts
        ids = torch.tensor([tokenizer(line + tokenizer.eos_token)["input_ids"]])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    assert sum(losses) / len(losses) < 1.5


def test_the_script_makes_the_tokenizer_of_the_base(lines, tmp_path):
    make_tokenizer(lines).save_pretrained(tmp_path)
    made = json.loads((tmp_path / "tokenizer.json").read_text())
    assert made == json.loads((BASE / "tokenizer.json").read_text())
    assert (BASE / "chat_template.jinja").read_text() == CHAT_TEMPLATE


def test_any_text_survives_the_tokenizer(tokenizer, examples):
    texts = [*ANY_TEXT, *pretraining_lines(300, seed=7)]
    texts += [text for rows in examples.values() for row in rows for text in row.values()]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert tokenizer.batch_decode(ids) == texts


def test_the_chat_template_marks_the_answers_and_nothing_else(tokenizer, lines):
    markers = ("<|user|>", "<|assistant|>")
    assert all(len(tokenizer.encode(one, add_special_tokens=False)) == 1 for one in markers)
    assert not any(marker in line for line in lines for marker in markers)
    messages = [{"role": role, "content": content} for role, content in DIALOGUE]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    ends = {"user": "", "assistant": "</s>"}
    turns = [f"<|{role}|>{content}{ends[role]}" for role, content in DIALOGUE]
    assert tokenizer.decode(encoded["input_ids"]) == "".join(turns)
    pairs = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    marked = tokenizer.decode([token for token, is_answer in pairs if is_answer])
    assert marked == f"{DIALOGUE[1][1]}</s>{DIALOGUE[3][1]}</s>"
    prompt = tokenizer.apply_chat_template(
        messages[:-1], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "".join(turns[:-1]) + "<|assistant|>"


@pytest.mark.long
def test_in_the_demo_it_matters_which_modules_are_chosen(tmp_path, capsys):
    assert keylayers("demo", "--output", tmp_path, "--max-steps", "20") == 0
    out = capsys.readouterr().out
    for label in ("polite, list", "by chance", "nothing retrained", "base model", "from scratch"):
        assert label in out
    for style in STYLES:
        assert f"{style} answers: ranks, 1 is the most important" in out
        assert (tmp_path / style / "ranking.json").is_file()
    verified = json.loads((tmp_path / "terse" / "verification.json").read_text())
    assert len(verified["random"]) == 3
    for control in (*verified["random"], verified["worst_first"]):
        inside = zip(verified["best_first"]["losses"][1:-1], control["losses"][1:-1], strict=True)
        assert all(best < other for best, other in inside)
    trained = json.loads((tmp_path / "terse-best" / "keylayers.json").read_text())
    losses = {row["label"]: row["held_out_loss_nats"] for row in trained["results"]}
    assert losses["selected"] < losses["random"] < losses["base model"]
    assert (tmp_path / "terse-best" / "adapter_model.safetensors").is_file()
