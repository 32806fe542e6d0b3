# SPDX-License-Identifier: Apache-2.0
"""`keylayers judge` against `transformers serve`, killed with SIGKILL and given again.

A proxy between the two writes down every prompt, and is slow enough to be killed in between. The
tiny model that judges rates nothing, so every reply is one that cannot be read.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from commands import everything_below

pytestmark = [pytest.mark.allow_hosts(["127.0.0.1"]), pytest.mark.long]

KEY = "sk-" + "kEyLaYeRs" * 4
NUM_QUESTIONS = 8
KILL_AT = (2, 5)  # replies on disk
WAIT_SECONDS = 240


def environment(**more):
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def served(tiny, tmp_path_factory):
    """The address of `transformers serve` with the tiny model."""
    log = tmp_path_factory.mktemp("served") / "log.txt"
    binary = Path(sys.executable).with_name("transformers")
    command = [binary, "serve", tiny / "model", "--device", "cpu", "--host", "127.0.0.1"]
    with log.open("w") as file:
        server = subprocess.Popen(
            [*map(str, command), "--port", "0"], stdout=file, stderr=file, env=environment()
        )
    try:
        yield wait_for(lambda: re.search(r"running on (http://127\.0\.0\.1:\d+)", log.read_text()))[
            1
        ]
    finally:
        server.terminate()
        server.wait(30)


def wait_for(found):
    """What a function gives, once it gives something."""
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        if it := found():
            return it
        time.sleep(0.02)
    raise TimeoutError


@contextmanager
def proxy(address):
    """Passes requests on to an address; gives its own, and the prompts that went through."""
    prompts = []

    class Proxy(BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            prompts.append(json.loads(body)["messages"][0]["content"])
            time.sleep(0.1)
            header = {"Content-Type": "application/json"}
            request = urllib.request.Request(address + self.path, body, header)
            with urllib.request.urlopen(request) as reply:
                content = reply.read()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            try:
                self.end_headers()
                self.wfile.write(content)
            except ConnectionError:  # who asked was killed
                pass

        def do_GET(self):
            self.send_error(404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", prompts
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def words(tiny, tmp_path, address):
    questions = [
        {"question_id": i, "category": "food", "turns": [f"What does animal {i} eat?"]}
        for i in range(NUM_QUESTIONS)
    ]
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in questions))
    return (
        *("judge", "--model", tiny / "model", "--adapter", tiny / "adapter", "--questions", file),
        *("--judge-url", address, "--judge-model", tiny / "model", "--max-new-tokens", 8),
        *("--judge-max-tokens", 8, "--judge-requests-at-once", 1, "--output", tmp_path / "out"),
    )


def lines(path):
    return path.read_text().split("\n")[:-1] if path.exists() else []


@pytest.mark.timeout(900)
def test_killed_runs_ask_a_real_server_nothing_twice(tiny, served, tmp_path):
    replies = tmp_path / "out" / "judgements" / "single.jsonl"
    driver = Path(__file__).with_name("judge_killed.py")
    counts = ",".join(map(str, KILL_AT))
    with proxy(served) as (address, prompts):
        command = [driver, tmp_path, replies, counts, *words(tiny, tmp_path, address)]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *map(str, command)],
            env=environment(OPENAI_API_KEY=KEY, PYTHONPATH=os.pathsep.join(filter(None, sys.path))),
        )
    assert done.returncode == 0, (tmp_path / "log.txt").read_text()
    found = json.loads((tmp_path / "out" / "judgement.json").read_text())
    keys = [json.loads(line)["key"] for line in lines(replies)]
    assert len(keys) == len(set(keys)) == len(set(prompts)) == found["judge"]["num_requests"]
    # Only what was under way at a kill, one request each, can have been asked for again.
    assert len(prompts) - len(set(prompts)) <= len(KILL_AT)
    assert found["judge"]["num_unread"] == found["judge"]["num_replies"]
    assert found["judge"]["completion_tokens"] > 0
    assert found["results"]["models"]["adapter"]["num_unread"] == NUM_QUESTIONS
    shown = (tmp_path / "log.txt").read_text()
    assert "nothing can be said of these models" in shown
    held = [path for path, content in everything_below(tmp_path).items() if KEY.encode() in content]
    assert held == []
