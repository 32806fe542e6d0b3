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

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes" / "inspect"
INSPECT = os.environ.get("INSPECT")
WAIT_SECONDS = 240

pytestmark = pytest.mark.skipif(
    not INSPECT,
    reason="set INSPECT to the Python of an environment with recipes/inspect/requirements.txt",
)


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def driver():
    """One process of inspect for all tasks: importing it takes seconds."""
    command = [INSPECT, Path(__file__).with_name("inspected.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as it:
        yield it
        it.stdin.close()


@pytest.fixture
def inspected(driver, tmp_path):
    """Runs a task with mocks that answer by what they are asked; gives what it came to."""

    def run(task, arguments, model=(), grader=(), is_run=True):
        file = "problems.py" if task == "problems" else "mt_bench.py"
        job = {"file": str(RECIPES / file), "task": task, "arguments": arguments}
        job["replies"] = {"model": list(model), "grader": list(grader)} if is_run else None
        driver.stdin.write(json.dumps({**job, "folder": str(tmp_path)}) + "\n")
        driver.stdin.flush()
        return json.loads(driver.stdout.readline())

    return run


QUESTIONS = [
    {"question_id": 1, "category": "writing", "turns": ["Write one.", "Write two."]},
    {"question_id": 2, "category": "math", "turns": ["Add one.", "Add two."]},
]
REFERENCES = [{"question_id": 2, "choices": [{"turns": ["three", "five"]}]}]
ANSWERS = [["Write one.", "w1"], ["Write two.", "w2"], ["Add one.", "a1"], ["Add two.", "a2"]]


def question_files(folder):
    return {
        "questions": lines(folder / "questions.jsonl", QUESTIONS),
        "references": lines(folder / "references.jsonl", REFERENCES),
    }


def test_both_turns_are_rated_and_an_unreadable_rating_is_in_no_mean(inspected, tmp_path):
    grader = [["Write two.", "<think>[[2]]</think> [[4]]"], ["Add two.", "either [[3]] or [[4]]"]]
    grader += [["Write one.", "Good. Rating: [[8]]"], ["Add one.", "[[6.5]]"]]
    found = inspected("rating", question_files(tmp_path), ANSWERS, grader)
    first, second = found["values"]
    assert first == {"turn_1": 8.0, "turn_2": 4.0, "rating": 6.0}
    assert second["turn_1"] == 6.5
    assert math.isnan(second["turn_2"])
    metrics = found["metrics"]
    assert metrics["turn_1  mean"] == pytest.approx((8 + 6.5) / 2)
    assert metrics["turn_2  mean"] == 4
    assert metrics["rating  mean"] == metrics["rating  grouped_writing"] == 6
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


def test_a_win_counts_only_if_both_orders_agree(inspected, tmp_path):
    rating = [["rating", "[[5]]"]]
    files = question_files(tmp_path)
    ours, theirs = (
        inspected("rating", files, [[key, name + reply] for key, reply in ANSWERS], rating)
        for name in ("ours", "theirs")
    )
    arguments = {"log": ours["log"], "against": theirs["log"]}
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
    found = inspected("pairwise", arguments, grader=verdicts)
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


def test_answers_are_checked_and_text_without_an_answer_is_wrong(inspected, tmp_path):
    arguments = {"data": lines(tmp_path / "p.jsonl", [row for row, _ in PROBLEMS])}
    for place, right in enumerate("CI"):
        replies = [[row.get("problem") or row["question"], said[place]] for row, said in PROBLEMS]
        found = inspected("problems", arguments, replies)
        assert found["values"] == [right] * len(PROBLEMS)
    assert all("\\boxed{}" in one["text"] for one in found["prompts"]["model"])
    assert {one["temperature"] for one in found["prompts"]["model"]} == {0.0}


def test_samples_give_pass_at_k_and_a_vote_over_answers(inspected, tmp_path):
    arguments = {"samples": 4}
    rows = [{"problem": "A?", "answer": "1/2"}, {"problem": "B?", "answer": "2"}]
    arguments["data"] = lines(tmp_path / "p.jsonl", rows)
    # A: two ways to write the right answer win over two different wrong ones. B: a tie of two.
    replies = [["A?", f"\\boxed{{{answer}}}"] for answer in ("0.5", "\\frac{1}{2}", "3", "4")]
    replies += [["B?", f"\\boxed{{{answer}}}"] for answer in ("2", "7", "2", "7")]
    found = inspected("problems", arguments, replies)
    metrics = {key: value for key, value in found["metrics"].items() if "accuracy" in key}
    by_reducer = {key.split(" ")[1]: value for key, value in metrics.items()}
    both_wrong = math.comb(2, 2) / math.comb(4, 2)
    assert by_reducer == pytest.approx(
        {"pass_at_1": 0.5, "pass_at_2": 1 - both_wrong, "pass_at_4": 1, "majority_vote": 0.75}
    )
    assert {one["temperature"] for one in found["prompts"]["model"]} == {0.7}


def test_a_row_without_an_answer_is_refused(inspected, tmp_path):
    data = lines(tmp_path / "p.jsonl", [{"problem": "A?", "answer": None}])
    found = inspected("problems", {"data": data})
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

    questions = lines(tmp_path / "q.jsonl", QUESTIONS)
    model = f"openai-api/local/{tiny / 'model'}"
    command = ["eval", RECIPES / "mt_bench.py@rating", "-T", f"questions={questions}"]
    command += ["--model", model, "--model-role", f"grader={model}", "--max-tokens", "8"]
    inspect(*command, "--log-dir", tmp_path / "logs", "--display", "plain")
    (path,) = (tmp_path / "logs").iterdir()
    log = json.loads(inspect("log", "dump", path))
    assert log["status"] == "success"
    answers = [sample["metadata"]["answers"] for sample in log["samples"]]
    assert [len(each) for each in answers] == [2, 2]
    assert any(text for each in answers for text in each)
