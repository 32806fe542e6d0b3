# SPDX-License-Identifier: Apache-2.0
"""Tasks of the harness: what decides a result, and which prompts were cut."""

import json
import os
import sys

import pytest

from commands import keylayers
from eval_files import WRITTEN, write_place


@pytest.fixture
def place(tiny, tmp_path, monkeypatch):
    """A folder with all that is evaluated."""
    folder = tmp_path / "place"
    folder.mkdir()
    write_place(tiny, folder)
    monkeypatch.chdir(folder)
    return folder


def write_task(place, name, questions, text):
    data = place / "tasks" / f"{name}.jsonl"
    rows = [{"question": one, "choices": ["corn", "mice"], "right": 0} for one in questions]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
    (place / "tasks" / f"{name}.yaml").write_text(text + files)


FILTERED = """
filter_list:
  - name: own
    filter:
      - {function: custom, filter_fn: !function own.last}
      - {function: take_first}
"""
FILTER = '"""A filter."""\n\n\ndef last(answers, documents):\n    return answers  # {}\n'


def test_a_task_with_a_filter_of_its_own_is_known_again(place, capsys):
    text = WRITTEN.replace("task: written", "task: filtered") + FILTERED
    write_task(place, "filtered", ["The fox eats", "The owl eats"], text)
    own = place / "tasks" / "own.py"
    arguments = ["eval", "--model", "model", "--task-folder", "tasks", "--tasks", "filtered"]
    said, modules = [], []
    for step in range(3):
        # The harness imports it anew, to another place in memory, as another process would.
        modules.append(dict(sys.modules))
        own.write_text(FILTER.format("as they are" if step < 2 else "in other words"))
        os.utime(own, ns=(step, step))
        assert keylayers(*arguments, "--output", "out") == 0
        said.append("measured before" in capsys.readouterr().err)
    assert said == [False, True, False]


def test_every_prompt_that_is_cut_is_counted(place, capsys):
    long, short = "The fox eats corn and " * 30, "The fox eats"
    text = WRITTEN.replace("task: written", "task: long")
    write_task(place, "long", [f"{number} {long}" for number in range(5)] + [short], text)
    arguments = ["eval", "--model", "model", "--task-folder", "tasks", "--tasks", "long"]
    for batch_size in (1, 4):
        out = place / f"out-{batch_size}"
        assert keylayers(*arguments, "--batch-size", batch_size, "--output", out) == 0
        assert "long: 5 requests lost the beginning of their prompt" in " ".join(
            capsys.readouterr().out.split()
        )


def test_no_function_is_known_by_its_place_in_memory():
    from functools import partial

    from keylayers.evaluation.benchmarks import source_of

    class Callable:
        def __call__(self):
            """Nothing."""

    found = {"own": [write_task, partial(write_task, name="x"), len, Callable()], "n": 1}
    found = json.loads(json.dumps(found, default=source_of))
    assert " at 0x" not in str(found)
    assert "def write_task" in found["own"][0]
    assert found["own"][1][2] == {"name": "x"}
    assert "len" in found["own"][2]
    assert found["n"] == 1
