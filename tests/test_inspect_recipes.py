# SPDX-License-Identifier: Apache-2.0
"""The tasks of recipes/inspect, run in inspect's own environment.

`INSPECT` names the Python of that environment (`.ci/run` makes it); without it the tests are
skipped. Models are mocks, in one test a tiny model behind `transformers serve`.
"""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tiny_files import write_rows

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes" / "inspect"
INSPECT = os.environ.get("INSPECT")
WAIT_SECONDS = 240

pytestmark = pytest.mark.skipif(
    not INSPECT,
    reason="set INSPECT to the Python of an environment with recipes/inspect/requirements.txt",
)


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    """Runs a task with mocks that answer by what they are asked; gives what it came to.

    In one process of inspect for all tasks: importing it takes seconds.
    """
    folder = tmp_path_factory.mktemp("inspected")
    command = [INSPECT, Path(__file__).with_name("inspected.py")]

    def run(task, arguments, model=(), grader=(), is_run=True):
        for name in arguments:
            if isinstance(arguments[name], list):
                write_rows(folder / f"{name}.jsonl", arguments[name])
                arguments = arguments | {name: str(folder / f"{name}.jsonl")}
        file = RECIPES / ("problems.py" if task == "problems" else "mt_bench.py")
        job = {"file": str(file), "task": task, "arguments": arguments, "folder": str(folder)}
        job["replies"] = {"model": list(model), "grader": list(grader)} if is_run else None
        driver.stdin.write(json.dumps(job) + "\n")
        driver.stdin.flush()
        return json.loads(driver.stdout.readline())

    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as driver:
        yield run
        driver.stdin.close()


QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write one.", "Write two."]},
    {"question_id": 2, "category": "math", "turns": ["Add one.", "Add two."]},
]
REFERENCES = [{"question_id": 2, "choices": [{"turns": ["three", "five"]}]}]
ASKED = {"questions": QUESTIONS, "references": REFERENCES}
ANSWERS = [["Write one.", "w1"], ["Write two.", "w2"], ["Add one.", "a1"], ["Add two.", "a2"]]


def test_both_turns_are_rated_and_an_unreadable_rating_is_in_no_mean(inspected):
    grader = [["Write two.", "<think>[[2]]</think> [[4]]"], ["Add two.", "either [[3]] or [[4]]"]]
    grader += [["Write one.", "Good. Rating: [[8]]"], ["Add one.", "[[6.5]]"]]
    found = inspected("rating", ASKED, ANSWERS, grader)
    first, second = found["values"]
    assert first == {"turn_1": 8.0, "turn_2": 4.0, "rating": 6.0}
    assert second["turn_1"] == 6.5
    assert math.isnan(second["turn_2"])
    means = {"turn_1  mean": 7.25, "turn_2  mean": 4, "rating  mean": 6}
    means["rating  grouped_writing"] = 6
    assert {name: found["metrics"][name] for name in means} == means
    asked = [(one["text"], one["turn"], one["temperature"]) for one in found["prompts"]["model"]]
    assert asked == [
        ("Write one.", 1, 0.7),
        ("Write two.", 3, 0.7),  # the first turn and its answer come before
        ("Add one.", 1, 0.0),  # FastChat's temperatures
        ("Add two.", 3, 0.0),
    ]
    one, two, three, four = (one["text"] for one in found["prompts"]["grader"])
    assert "reference" not in one + two
    assert "<reference answer 1>\nthree\n" in three
    assert "five" not in three
    assert "<reference answer 2>\nfive\n" in four
    assert "<user 1>\nWrite one.\n</user 1>\n\n<assistant 1>\nw1\n" in two
    assert "<assistant 2>\nw2\n" in two


def test_a_win_counts_only_if_both_orders_agree(inspected):
    logs = {}
    for key, name in (("log", "ours"), ("against", "theirs")):
        answers = [[asked, name + reply] for asked, reply in ANSWERS]
        logs[key] = inspected("rating", ASKED, answers, [["rating", "[[5]]"]])["log"]
    # by the last answers: A is ours in the first of the two prompts of each pair
    verdicts = [
        ["<assistant A 2>\noursw2", "[[A]]"],
        ["<assistant A 2>\ntheirsw2", "[[B]]"],  # agrees: a win
        ["<assistant A 2>\noursa2", "[[C]]"],
        ["<assistant A 2>\ntheirsa2", "none"],  # unreadable
        ["<assistant A 1>\noursa1", "[[A]]"],
        ["<assistant A 1>\ntheirsa1", "[[A]]"],  # always the first: a tie
        ["<assistant A 1>\noursw1", "[[B]]"],
        ["<assistant A 1>\ntheirsw1", "[[A]]"],  # agrees: a loss
    ]
    found = inspected("pairwise", logs, grader=verdicts)
    assert found["prompts"]["model"] == []  # the answers come from the logs
    writing, math_ = found["values"]
    assert writing == {"turn_1": 0.0, "turn_2": 1.0, "orders_agree": 1.0}
    assert math_["turn_1"] == 0.5
    assert math.isnan(math_["turn_2"])
    assert found["metrics"]["turn_2  mean"] == 1.0
    assert len(found["prompts"]["grader"]) == 8


PROBLEMS = [
    ({"question": "A?", "answer": "way #### 1,234"}, ["so \\boxed{1234}", "1234 it may be"]),
    ({"problem": "B?", "answer": "\\frac{1}{2}"}, ["The answer is 0.5.", "\\boxed{1}, \\boxed{2}"]),
    ({"problem": "C?", "answer": 4}, ["\\boxed{5}, no, \\boxed{4}", "\\boxed{3568, 5880}"]),
    ({"problem": "D?", "answer": "(0, \\infty)"}, ["\\boxed{(0,\\infty)}", "I do not know"]),
]


def test_answers_are_checked_and_text_without_an_answer_is_wrong(inspected):
    for place, right in enumerate("CI"):
        replies = [[row.get("problem") or row["question"], said[place]] for row, said in PROBLEMS]
        found = inspected("problems", {"data": [row for row, _ in PROBLEMS]}, replies)
        assert found["values"] == [right] * len(PROBLEMS)
    assert all("\\boxed{}" in one["text"] for one in found["prompts"]["model"])
    assert {one["temperature"] for one in found["prompts"]["model"]} == {0.0}


def test_samples_give_pass_at_k_and_a_vote_over_answers(inspected):
    rows = [{"problem": "A?", "answer": "1/2"}, {"problem": "B?", "answer": "2"}]
    # A: two ways to write the right answer win over two different wrong ones. B: a tie of two.
    replies = [["A?", f"\\boxed{{{answer}}}"] for answer in ("0.5", "\\frac{1}{2}", "3", "4")]
    replies += [["B?", f"\\boxed{{{answer}}}"] for answer in ("2", "7", "2", "7")]
    found = inspected("problems", {"samples": 4, "data": rows}, replies)
    metrics = {key: value for key, value in found["metrics"].items() if "accuracy" in key}
    by_reducer = {key.split(" ")[1]: value for key, value in metrics.items()}
    both_wrong = math.comb(2, 2) / math.comb(4, 2)
    assert by_reducer == pytest.approx(
        {"pass_at_1": 0.5, "pass_at_2": 1 - both_wrong, "pass_at_4": 1, "majority_vote": 0.75}
    )
    assert {one["temperature"] for one in found["prompts"]["model"]} == {0.7}


def test_a_row_without_an_answer_is_refused(inspected):
    found = inspected("problems", {"data": [{"problem": "A?", "answer": None}]})
    assert "every row must have a problem and an answer" in found["error"]


def test_every_problem_of_the_real_sets_can_be_read(inspected, shared):
    for name, num in (("gsm", 210), ("math500", 500), ("aime", 30)):
        path = str(shared / "data" / "bench" / f"{name}.jsonl")
        assert inspected("problems", {"data": path}, is_run=False) == {"num_samples": num}


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    """The address of `transformers serve` with the tiny model."""
    log = tmp_path_factory.mktemp("served") / "log.txt"
    binary = Path(sys.executable).with_name("transformers")
    command = [binary, "serve", tiny / "model", "--device", "cpu", "--host", "127.0.0.1"]
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        server = subprocess.Popen(
            [*map(str, command), "--port", "0"], stdout=file, stderr=file, env=settings
        )
    try:
        end = time.monotonic() + WAIT_SECONDS
        while not (at := re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text())):
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield at[1]
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.long
def test_a_served_model_is_asked_and_graded_by_the_command_line(served, tiny, tmp_path):
    """As the recipe's README says; the tiny model rates nothing, so its ratings are unreadable."""

    def inspect(*arguments):
        done = subprocess.run(
            [Path(INSPECT).with_name("inspect"), *map(str, arguments)],
            env=os.environ | {"LOCAL_BASE_URL": f"{served}/v1", "LOCAL_API_KEY": "none"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    write_rows(tmp_path / "q.jsonl", QUESTIONS)
    model = f"openai-api/local/{tiny / 'model'}"
    command = ["eval", RECIPES / "mt_bench.py@rating", "-T", f"questions={tmp_path / 'q.jsonl'}"]
    command += ["--model", model, "--model-role", f"grader={model}", "--max-tokens", "8"]
    inspect(*command, "--log-dir", tmp_path / "logs", "--display", "plain")
    (path,) = (tmp_path / "logs").iterdir()
    log = json.loads(inspect("log", "dump", path))
    assert log["status"] == "success"
    answers = [sample["metadata"]["answers"] for sample in log["samples"]]
    assert [len(each) for each in answers] == [2, 2]
    assert any(text for each in answers for text in each)
