# SPDX-License-Identifier: Apache-2.0
"""What `keylayers eval` takes, and what it refuses in one line."""

import pytest

from commands import keylayers
from eval_files import MODELS
from tiny_files import tiny_tokenizer


def test_a_chat_template_and_examples_are_part_of_the_prompt(place, tmp_path, monkeypatch, capsys):
    """The prompts that the harness logs, as the model is asked."""
    seen = []
    from keylayers.evaluation import benchmarks

    evaluate = benchmarks.lm_eval.evaluate

    def spy(**kwargs):
        found = evaluate(**kwargs)
        (samples,) = found["samples"].values()
        seen.append(samples[0]["arguments"][0][0])
        return found

    monkeypatch.setattr(benchmarks.lm_eval, "evaluate", spy)
    tasks = ["--task-folder", "tasks", "--tasks", "three", "fixed", "--limit", "2"]
    arguments = ["--model", "model", *tasks]
    arguments += ["--num-fewshot", "1", "--apply-chat-template", "--chat-template", "alpaca"]
    assert keylayers("eval", *arguments, "--output", tmp_path / "out") == 0
    assert seen[0].count("### Instruction:") == 2
    assert seen[0].endswith("### Response:\n")
    assert seen[1].count("### Instruction:") == 1
    shown = capsys.readouterr().out
    assert "base model, fixed: 0 examples in each prompt: the task file fixes" in shown


ONE = ["--model", "model"]
BAD = [
    (ONE, "something must be measured"),
    ([*ONE, "--tasks", "three", "--task-folder", "none"], "there is no 'none'"),
    ([*ONE, "--task-folder", "tasks", "--tasks", "broken"], "'no_such_field' is undefined"),
    ([*ONE, "--task-folder", "tasks", "--tasks", "gone"], "must be valid and their documents"),
    ([*ONE, "--tasks", "three", "--limit", "0"], "`limit` must be at least 1"),
    ([*ONE, "--tasks", "three", "--towers", "all"], "`towers` must be left out"),
    ([*ONE, "--data", "data.jsonl", "--num-fewshot", "2"], "`num_fewshot` must be left out"),
    ([*ONE, "--data", "none.jsonl"], "`data` must be a file"),
    ([*ONE, "--data", "data.jsonl", "--limit", "3"], "`limit` must be left out"),
    ([*ONE, "--forgetting-data", "none.txt"], "must be a readable text"),
    ([*ONE, "--forgetting-data", "known.txt", "--chat-template", "x"], "that is no plain text"),
    ([*ONE, "--forgetting-data", "known.txt", "--held-out", "3"], "`held_out` must be left out"),
    ([*MODELS, "--tasks", "x", "--reference", "base"], "`reference` must be one of the adapters"),
    (["--model", "model", "--adapter", "a", "a", "--tasks", "x"], "'a' twice"),
    (["--model", "model", "--adapter", "none/here/x", "--data", "data.jsonl"], "no such folder"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line(place, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert keylayers("eval", *arguments, "--output", out) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("keylayers: ")
    assert message in error
    assert not (out / "evaluation.json").exists()


def test_a_missing_library_is_one_line(place, tmp_path, monkeypatch, capsys):
    from keylayers.evaluation import run

    monkeypatch.setattr(run, "find_spec", lambda name: None)
    arguments = [*ONE, "--task-folder", "tasks", "--tasks", "three", "--output", tmp_path / "out"]
    assert keylayers("eval", *arguments) == 2
    assert "pip install 'keylayers[eval]'" in capsys.readouterr().err


def test_a_model_that_gives_nan_is_one_line(place, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    arguments = ["--model", tmp_path / "broken", "--forgetting-data", "known.txt"]
    assert keylayers("eval", *arguments, "--output", tmp_path / "out") == 2
    assert "gives NaN or infinity on forgetting" in capsys.readouterr().err


def test_a_damaged_file_of_results_is_one_line(place, tmp_path, capsys):
    (tmp_path / "documents.parquet").write_text("not a table")
    arguments = [*ONE, "--forgetting-data", "known.txt", "--output", tmp_path]
    assert keylayers("eval", *arguments) == 2
    assert "must be a file that `keylayers eval` wrote" in capsys.readouterr().err
    assert (tmp_path / "documents.parquet").read_text() == "not a table"
