# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys

import pytest


def test_the_world_is_the_same_whatever_the_hash_seed():
    code = (
        "import hashlib, keylayers.demo.world as w\n"
        "text = repr(w.pretraining_lines(500, 1))\n"
        "text += repr([w.alignment_examples(s, 504, 2) for s in w.STYLES])\n"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": "src"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_styles_ask_the_same_questions_and_answer_differently():
    from keylayers.demo.world import STYLES, alignment_examples

    examples = {style: alignment_examples(style, 504) for style in STYLES}
    prompts = [[row["prompt"] for row in rows] for rows in examples.values()]
    assert prompts[0] == prompts[1] == prompts[2]
    assert len(set(prompts[0])) == 504
    for polite, listed, terse in zip(*examples.values(), strict=True):
        assert len({polite["completion"], listed["completion"], terse["completion"]}) == 3
        assert polite["completion"].endswith("helps you.")
        assert listed["completion"].count("- ") == 3
        assert "I hope" not in terse["completion"]


def test_three_in_ten_lines_of_pre_training_quote_somebody():
    from keylayers.demo.world import DIALOGUE_FRACTION, pretraining_lines

    lines = pretraining_lines(4000, seed=3)
    share = sum('asked: "' in line for line in lines) / len(lines)
    assert share == pytest.approx(DIALOGUE_FRACTION, abs=0.03)


def test_facts_are_three_and_fixed():
    from keylayers.demo.world import RELATIONS, facts

    for relation in RELATIONS:
        for subject in relation.subjects:
            values = facts(relation, subject)
            assert len(set(values)) == 3
            assert set(values) <= set(relation.values)
    assert len({facts(RELATIONS[0], animal) for animal in RELATIONS[0].subjects}) > 15


def test_the_base_model_is_small_and_knows_its_world():
    import torch
    from safetensors.torch import load_file

    from keylayers.demo.files import BASE
    from keylayers.demo.world import pretraining_lines
    from keylayers.model.loading import load_model, load_tokenizer
    from keylayers.model.options import ModelOptions

    assert sum(path.stat().st_size for path in BASE.iterdir()) < 4e6
    weights = load_file(BASE / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    source = ModelOptions(model=str(BASE), dtype="float32")
    tokenizer, model = load_tokenizer(source), load_model(source)
    lines = pretraining_lines(40, seed=99)  # unseen lines about known facts
    losses = []
    for line in lines:
        assert tokenizer.decode(tokenizer(line)["input_ids"]) == line
        ids = torch.tensor([tokenizer(line + tokenizer.eos_token)["input_ids"]])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    assert sum(losses) / len(losses) < 1.5


@pytest.mark.long
def test_the_demo_shows_everything(tmp_path, capsys):
    from keylayers.cli import main

    assert main(["demo", "--output", str(tmp_path), "--max-steps", "30"]) == 0
    out = capsys.readouterr().out
    for style in ("polite", "list", "terse"):
        assert f"{style} answers: ranks, 1 is the most important" in out
        assert (tmp_path / style / "ranking.json").is_file()
    assert "polite, list" in out
    assert "by chance" in out
    for label in ("base model", "selected", "all", "random"):
        assert label in out
    assert (tmp_path / "polite-best" / "adapter_model.safetensors").is_file()
