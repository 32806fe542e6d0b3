# SPDX-License-Identifier: Apache-2.0
"""What `keylayers eval` takes: prompts, models and names, and what it refuses in one line."""

import pytest

from commands import keylayers
from eval_files import MODELS, write_place
from tiny_files import ANIMALS, FOODS, tiny_tokenizer


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """A folder with all that is evaluated."""
    folder = tmp_path_factory.mktemp("eval")
    write_place(tiny, folder)
    return folder


def test_a_chat_template_and_examples_are_part_of_the_prompt(place, tmp_path, monkeypatch, capsys):
    """The prompts that the harness logs, as the model is asked."""
    monkeypatch.chdir(place)
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


def test_the_base_model_is_the_same_after_each_adapter(place):
    from keylayers.evaluation.options import ComparedOptions
    from keylayers.evaluation.subjects import each_model, subjects_of
    from keylayers.model.options import ModelOptions
    from keylayers.model.weights import weights_sha256

    source = ModelOptions(model=str(place / "model"))
    compared = ComparedOptions(adapter=(str(place / "other"), str(place / "adapter")))
    hashes = []
    for loaded in each_model(subjects_of(source, compared), source, None):
        if loaded.subject.kind == "base":
            model, names = loaded.model, [name for name, _ in loaded.model.named_modules()]
        hashes.append(loaded.identity)
    assert weights_sha256(model) == loaded_hash(place)
    assert [name for name, _ in model.named_modules()] == names
    assert not hasattr(model, "peft_config")
    assert len(set(hashes)) == 3


def loaded_hash(place):
    from keylayers.model.loading import load_model
    from keylayers.model.options import ModelOptions
    from keylayers.model.weights import weights_sha256

    return weights_sha256(load_model(ModelOptions(model=str(place / "model"))))


def test_names_tell_models_apart(tmp_path):
    from keylayers.evaluation.options import ComparedOptions
    from keylayers.evaluation.subjects import subjects_of
    from keylayers.model.options import ModelOptions

    def names(*sources):
        compared = ComparedOptions(adapter=sources)
        return [one.name for one in subjects_of(ModelOptions(model="m"), compared)]

    assert names("runs/a", "runs/b") == ["base model", "a", "b"]
    assert names("a/out", "b/out") == ["base model", "a/out", "b/out"]
    assert names("owner/model", "x/base model") == ["base model", "owner/model", "x/base model"]


ONE = ["--model", "model"]
BAD = [
    (ONE, "something must be measured"),
    ([*ONE, "--tasks", "three", "--task-folder", "none"], "there is no 'none'"),
    ([*ONE, "--task-folder", "tasks", "--tasks", "broken"], "'no_such_field' is undefined"),
    (
        [*ONE, "--task-folder", "tasks", "--tasks", "gone"],
        "must be in order and their documents in",
    ),
    ([*ONE, "--tasks", "three", "--limit", "0"], "`limit` must be at least 1"),
    ([*ONE, "--tasks", "three", "--towers", "all"], "`towers` must be left out"),
    ([*ONE, "--data", "data.jsonl", "--num-fewshot", "2"], "`num_fewshot` must be left out"),
    ([*ONE, "--data", "none.jsonl"], "`data` must be a file"),
    ([*ONE, "--data", "data.jsonl", "--limit", "3"], "`limit` must be left out"),
    ([*ONE, "--forgetting-data", "none.txt"], "must be a readable text"),
    (
        [*ONE, "--forgetting-data", "known.txt", "--chat-template", "chatml"],
        "`forgetting_data` that is no plain text",
    ),
    ([*ONE, "--forgetting-data", "known.txt", "--held-out", "3"], "`held_out` must be left out"),
    (
        [*MODELS, "--tasks", "three", "--reference", "base"],
        "`reference` must be one of the adapters",
    ),
    (["--model", "model", "--adapter", "a", "a", "--tasks", "x"], "'a' twice"),
    (["--model", "model", "--adapter", "none/here/x", "--data", "data.jsonl"], "no such folder"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line(place, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(place)
    out = tmp_path / "out"
    assert keylayers("eval", *arguments, "--output", out) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("keylayers: ")
    assert message in error
    assert not (out / "evaluation.json").exists()


def test_a_model_with_another_tokenizer_is_not_compared_by_losses(
    place, tmp_path, monkeypatch, capsys
):
    from transformers import AutoTokenizer

    (tmp_path / "tuned").mkdir()
    for path in (place / "tuned").iterdir():
        (tmp_path / "tuned" / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(place / "tuned")
    tokenizer.add_tokens([f"{one[-1]} eat" for one in (*ANIMALS, *FOODS)])
    tokenizer.save_pretrained(tmp_path / "tuned")
    monkeypatch.chdir(place)
    arguments = [*ONE, "--checkpoint", tmp_path / "tuned", "--data", "data.jsonl"]
    assert keylayers("eval", *arguments, "--output", tmp_path / "out") == 2
    assert "only between models of one tokenizer" in capsys.readouterr().err


def test_a_missing_library_is_one_line(place, tmp_path, monkeypatch, capsys):
    from keylayers.evaluation import run

    monkeypatch.chdir(place)
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    arguments = [*ONE, "--task-folder", "tasks", "--tasks", "three", "--output", tmp_path / "out"]
    assert keylayers("eval", *arguments) == 2
    assert "pip install 'keylayers[eval]'" in capsys.readouterr().err


def test_a_model_that_gives_nan_is_one_line(place, tmp_path, monkeypatch, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    monkeypatch.chdir(place)
    arguments = ["--model", tmp_path / "broken", "--forgetting-data", "known.txt"]
    assert keylayers("eval", *arguments, "--output", tmp_path / "out") == 2
    assert "gives NaN or infinity on forgetting" in capsys.readouterr().err


def test_a_damaged_file_of_results_is_one_line(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(place)
    (tmp_path / "documents.parquet").write_text("not a table")
    arguments = [*ONE, "--forgetting-data", "known.txt", "--output", tmp_path]
    assert keylayers("eval", *arguments) == 2
    assert "must be a file that `keylayers eval` wrote" in capsys.readouterr().err
    assert (tmp_path / "documents.parquet").read_text() == "not a table"


def test_training_on_another_split_is_said(place, tmp_path, monkeypatch, capsys):
    """Then the adapter may have seen what counts as held out here."""
    import shutil

    monkeypatch.chdir(place)
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
    shutil.rmtree(out)
