# SPDX-License-Identifier: Apache-2.0
"""`kill -9` at any moment loses nothing: the same command ends as if it had never been killed.

Each command is killed at KILLS random moments (3 unless the environment says otherwise; the full
count of 50 each is in experiments/LOG.md), and right before CHANGES changes of the disk (6; 0 for
every one, which is there too): random moments seldom meet the milliseconds between two of them.
"""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import preloaded
from outputs import contents, differences

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
KILLS = int(os.environ.get("KILLS", "3"))
CHANGES = int(os.environ.get("CHANGES", "6"))
SMALL = ("--batch-size", "4", "--lora-rank", "4", "--save-steps", "2", "--learning-rate", "0.02")


def command_on(tiny, words):
    inputs = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--output", "out")
    return [str(word) for word in (*words, *SMALL, *inputs)]


def run(place, words, how="change", at=0):
    """Run the command in `place`, in a process that is killed unless `at` is 0."""
    place.mkdir(exist_ok=True)
    script = str(Path(__file__).with_name("killing.py"))
    return subprocess.run(
        [preloaded.python(), "-W", "ignore", script, how, str(at), *words],
        cwd=place,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def finished(place, words):
    """What a run that is not killed leaves in `place`, and what it tells."""
    done = run(place, words)
    assert done.returncode == 0, done.stderr[-2000:]
    left = contents(place)
    assert {Path(path).parts[0] for path in left} == {"out"}
    return left, json.loads(done.stdout.splitlines()[-1])


COMMANDS = {
    "rank": ("rank", "--max-steps", 30, "--mask-batches", 2),
    "train": ("train", "--rank-first", "--steps", 20, "--mask-batches", 2, "--controls", "random"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_run_ends_as_if_it_had_not_been(tiny, tmp_path, name):
    words = command_on(tiny, COMMANDS[name])
    whole, told = finished(tmp_path / "whole", words)
    draw, kills, number = random.Random(0), 0, 0
    while kills < KILLS:
        number += 1
        place = tmp_path / str(number)
        for _ in range(1 + number % 2):  # every other time the run that goes on is killed too
            code = run(place, words, "moment", draw.uniform(0.001, told["seconds"])).returncode
            assert code in (0, -signal.SIGALRM)
            kills += code != 0
        assert differences(whole, finished(place, words)[0]) == [], number


FEWER_STEPS = {
    "rank": ("rank", "--max-steps", 6, "--mask-batches", 2),
    "train": ("train", "--rank-first", "--steps", 8, "--mask-batches", 2, "--controls", "random"),
    "full": ("rank", "--max-steps", 4, "--mask-batches", 2, "--update", "full"),
}


@pytest.mark.parametrize("name", FEWER_STEPS)
def test_so_does_one_that_is_killed_before_a_change_of_the_disk(tiny, tmp_path, name):
    words = command_on(tiny, FEWER_STEPS[name])
    whole, told = finished(tmp_path / "whole", words)
    assert told["changes"] >= 50
    num_kills = CHANGES or told["changes"]
    for number in range(1, num_kills + 1):
        place, at = tmp_path / str(number), round(number * told["changes"] / num_kills)
        assert run(place, words, "change", at).returncode == -signal.SIGKILL
        assert differences(whole, finished(place, words)[0]) == [], at
