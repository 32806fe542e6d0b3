# SPDX-License-Identifier: Apache-2.0
"""Many requests to the judge: side by side, kept, counted where refused, and never asked twice."""

import json
import threading
import time

import pytest

from scripted_judge import endpoint
from test_judge_endpoint import KEY, SLOW_DOWN, options

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def requests(count):
    from keylayers.evaluation.judge.requests import JudgeRequest

    return [JudgeRequest(f"key {i}", f"prompt {i}", i, 1, ("m",), ("s",)) for i in range(count)]


class Notes:
    def __init__(self):
        self.lines = []

    def stage(self, title, num_steps):
        from keylayers.progress import Silent

        return Silent().stage(title, num_steps)

    def note(self, text):
        self.lines.append(text)


def ask_all(script, path, count, **more):
    from keylayers.evaluation.judge.asking import ask_all as run
    from keylayers.evaluation.judge.client import JudgeClient

    settings = options(script.address, **{"judge_retries": 0, **more})
    with JudgeClient(settings) as client:
        return run(client, requests(count), path, settings.judge_requests_at_once, Notes())


@pytest.mark.parametrize("at_once", [1, 5])
def test_what_was_asked_is_not_asked_again(tmp_path, at_once):
    path = tmp_path / "replies.jsonl"
    with endpoint(("text", "[[7]]")) as script:
        first = ask_all(script, path, 6, judge_requests_at_once=at_once)
        again = ask_all(script, path, 8, judge_requests_at_once=at_once)
    assert (first.num_new, again.num_new) == (6, 2)
    assert {one.text for one in again.replies.values()} == {"[[7]]"}
    said = [one["messages"][0]["content"] for one in script.asked]
    assert sorted(said) == sorted(f"prompt {i}" for i in range(8))
    assert len(path.read_text().splitlines()) == 8


def test_requests_go_out_side_by_side(tmp_path):
    barrier = threading.Barrier(4, timeout=10)

    class Judge:
        def ask(self, prompt):
            from keylayers.evaluation.judge.client import Reply

            barrier.wait()  # passes only if four are under way at once
            return Reply("[[1]]", "stop", 1, 1)

    from keylayers.evaluation.judge.asking import ask_all as run

    assert run(Judge(), requests(8), tmp_path / "r.jsonl", 4, Notes()).num_new == 8


def test_an_interrupted_run_keeps_what_was_under_way(tmp_path):
    import os
    import signal

    from keylayers.evaluation.judge.asking import ask_all as run
    from keylayers.evaluation.judge.client import Reply

    class Judge:
        def ask(self, prompt):
            if prompt == "prompt 2":
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            return Reply("[[1]]", "stop", 1, 1)

    notes, path = Notes(), tmp_path / "r.jsonl"
    # A job in a shell's background starts with interrupts ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(Judge(), requests(50), path, 2, notes)
    finally:
        signal.signal(signal.SIGINT, before)
    kept = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert "key 2" in kept
    assert len(kept) < 10
    assert notes.lines == ["waiting up to 20 s for replies under way, to keep them"]


def test_an_endpoint_that_gives_up_leaves_what_it_said(tmp_path):
    from keylayers.errors import JudgeError

    path = tmp_path / "replies.jsonl"
    with (
        endpoint(("text", "[[7]]"), ("text", "[[8]]"), SLOW_DOWN) as script,
        pytest.raises(JudgeError, match=r"2 replies are kept, and the same command goes on$"),
    ):
        ask_all(script, path, 5)
    assert len(path.read_text().splitlines()) == 2
    with endpoint(("text", "[[9]]")) as script:
        assert ask_all(script, path, 5).num_new == 3


def test_one_prompt_that_is_refused_stops_nothing_and_is_asked_again(tmp_path):
    path = tmp_path / "replies.jsonl"
    too_long = ("status", 400, "too long")
    with endpoint(("text", "[[7]]"), too_long, ("text", "[[8]]")) as script:
        found = ask_all(script, path, 4)
    assert (found.num_new, len(found.replies)) == (3, 3)
    assert found.refused == {"key 1": "HTTP 400: 'too long'"}
    with endpoint(("text", "[[9]]")) as script:
        assert ask_all(script, path, 4).num_new == 1


def test_an_endpoint_that_refuses_everything_is_left_in_peace(tmp_path):
    from keylayers.errors import JudgeError

    with (
        endpoint(("status", 400, "unknown parameter max_tokens")) as script,
        pytest.raises(JudgeError, match=r"no reply to the first 3: HTTP 400: 'unknown param"),
    ):
        ask_all(script, tmp_path / "r.jsonl", 50)
    assert len(script.asked) <= 4  # the next one may be under way already
    with (
        endpoint(("text", "[[7]]"), ("status", 500, "broken")) as script,
        pytest.raises(JudgeError, match=r"no reply to 10 in a row: HTTP 500.*1 replies are"),
    ):
        ask_all(script, tmp_path / "s.jsonl", 50)
    assert len(script.asked) <= 12


def test_a_line_that_was_not_finished_is_asked_again(tmp_path):
    path = tmp_path / "replies.jsonl"
    with endpoint(("text", "[[7]]")) as script:
        ask_all(script, path, 3)
        whole = path.read_bytes()
        path.write_bytes(whole[:-5])  # as a kill in the middle of writing leaves it
        assert ask_all(script, path, 3).num_new == 1
    assert path.read_bytes() == whole
    kept = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert kept == ["key 0", "key 1", "key 2"]


class Filter:
    """Refuses some prompts, always."""

    def __init__(self, numbers):
        self.refused = {f"prompt {i}" for i in numbers}
        self.asked = []

    def ask(self, prompt):
        from keylayers.evaluation.judge.client import Refused, Reply

        self.asked.append(prompt)
        if prompt in self.refused:
            raise Refused("HTTP 400: 'too long'")
        return Reply("[[7]]", "stop", 1, 1)


# Never in a row, as a question that is too long is asked about every other model.
ALWAYS_REFUSED = [(2, 9, 15), tuple(range(1, 40, 2))]


@pytest.mark.parametrize("numbers", ALWAYS_REFUSED, ids=len)
def test_prompts_that_are_always_refused_stop_no_later_run(tmp_path, numbers):
    from keylayers.evaluation.judge.asking import ask_all as run
    from keylayers.evaluation.judge.asking import kept_replies

    path, judge = tmp_path / "r.jsonl", Filter(numbers)
    refused = {f"key {i}" for i in numbers}
    for _ in range(3):
        found = run(judge, requests(40), path, 1, Notes())
        assert (len(found.replies), set(found.refused)) == (40 - len(numbers), refused)
    assert len(judge.asked) == 40 + 2 * len(numbers)
    replies, num_damaged = kept_replies(path)
    assert (len(replies), num_damaged) == (40 - len(numbers), 0)


def test_a_row_of_refused_prompts_stops_one_run_and_the_next_goes_beyond(tmp_path):
    from keylayers.errors import JudgeError
    from keylayers.evaluation.judge.asking import ask_all as run

    path, judge = tmp_path / "r.jsonl", Filter(range(1, 19))
    with pytest.raises(JudgeError, match="no reply to 10 in a row"):
        run(judge, requests(40), path, 1, Notes())
    found = run(judge, requests(40), path, 1, Notes())
    assert (len(found.replies), len(found.refused)) == (22, 18)


def test_an_endpoint_that_breaks_between_two_runs_is_left_in_peace(tmp_path):
    from keylayers.errors import JudgeError
    from keylayers.evaluation.judge.asking import ask_all as run

    path = tmp_path / "r.jsonl"
    run(Filter([2, 9, 15]), requests(20), path, 1, Notes())
    with pytest.raises(JudgeError, match=r"no reply to 10 in a row.*17 replies are kept"):
        run(Filter(range(100)), requests(100), path, 1, Notes())
