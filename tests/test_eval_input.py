# SPDX-License-Identifier: Apache-2.0
"""What `keylayers eval` takes: tasks and prompts; and what it refuses in one line."""

import os

import pytest

from commands import complaint, keylayers
from eval_files import MODELS, WRITTEN, write_documents
from keylayers.evaluation import benchmarks, run

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
    ([*ONE, "--adapter", "a", "a", "--tasks", "x"], "'a' twice"),
    ([*ONE, "--adapter", "none/here/x", "--data", "data.jsonl"], "no such folder"),
    (["--model", "nan", "--forgetting-data", "known.txt"], "gives NaN or infinity on forgetting"),
    (["--model", "no_row", "--data", "data.jsonl"], " eat' has id"),
    (["--model", "no_row", "--forgetting-data", "data.jsonl"], " eat' has id"),
    ([*ONE, "--checkpoint", "no_row", "--data", "data.jsonl"], "models must share a tokenizer"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_one_line(place, tmp_path, capsys, arguments, message):
    assert keylayers("eval", *arguments, "--output", tmp_path / "out") == 2
    assert message in complaint(capsys)
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_a_missing_library_is_one_line(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    arguments = [*ONE, "--task-folder", "tasks", "--tasks", "three", "--output", tmp_path / "out"]
    assert keylayers("eval", *arguments) == 2
    assert "pip install 'keylayers[eval]'" in complaint(capsys)


def test_a_damaged_file_of_results_is_one_line(place, tmp_path, capsys):
    (tmp_path / "documents.parquet").write_text("not a table")
    arguments = [*ONE, "--forgetting-data", "known.txt", "--output", tmp_path]
    assert keylayers("eval", *arguments) == 2
    assert "must be a file that `keylayers eval` wrote" in complaint(capsys)
    assert (tmp_path / "documents.parquet").read_text() == "not a table"


def test_a_chat_template_and_examples_are_part_of_the_prompt(said, monkeypatch):
    """The prompts that the harness logs, as the model is asked."""
    seen, evaluate = [], benchmarks.lm_eval.evaluate

    def spy(**kwargs):
        found = evaluate(**kwargs)
        (samples,) = found["samples"].values()
        seen.append(samples[0]["arguments"][0][0])
        return found

    monkeypatch.setattr(benchmarks.lm_eval, "evaluate", spy)
    arguments = [*ONE, "--task-folder", "tasks", "--tasks", "three", "fixed", "--limit", "2"]
    arguments += ["--num-fewshot", "1", "--apply-chat-template", "--chat-template", "alpaca"]
    shown, _ = said(*arguments)
    assert [prompt.count("### Instruction:") for prompt in seen] == [2, 1]
    assert seen[0].endswith("### Response:\n")
    assert "base model, fixed: 0 examples in each prompt: the task file fixes" in shown


def write_task(folder, questions, more=""):
    """A task of the kind of `written`; the arguments that measure it."""
    folder.mkdir()
    files = write_documents(folder / "own.jsonl", questions, [["corn", "mice"]] * len(questions))
    (folder / "own.yaml").write_text(WRITTEN.replace("task: written", "task: own") + more + files)
    return [*ONE, "--task-folder", folder, "--tasks", "own"]


FILTERED = """
filter_list:
  - name: own
    filter:
      - {function: custom, filter_fn: !function own.last}
      - {function: take_first}
"""
FILTER = """
from functools import partial

def all_of(answers, documents, more):
    return answers  # {}

last = partial(all_of, more=len)
"""


def test_a_task_with_a_filter_of_its_own_is_known_again(said, tmp_path):
    folder = tmp_path / "tasks"
    arguments = write_task(folder, ["The fox eats", "The owl eats"], FILTERED)
    is_known = []
    for step in range(3):
        # The harness imports it again, to another place in memory, as another process would.
        (folder / "own.py").write_text(FILTER.format("as it is" if step < 2 else "in other words"))
        os.utime(folder / "own.py", ns=(step, step))
        is_known.append("measured before" in said(*arguments)[1])
    assert is_known == [False, True, False]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_every_prompt_that_is_cut_is_counted(said, tmp_path, batch_size):
    questions = [f"{number} {'The fox eats corn and ' * 30}" for number in range(5)]
    arguments = write_task(tmp_path / "tasks", [*questions, "The fox eats"])
    shown, _ = said(*arguments, "--batch-size", batch_size)
    assert "own: 5 requests lost the beginning of their prompt" in shown
