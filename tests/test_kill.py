# SPDX-License-Identifier: Apache-2.0
"""`kill -9` at any moment loses nothing: the same command ends as if it had never been killed.

Each command is killed at KILLS random moments (3 unless the environment says otherwise; the full
count of 50 each is in experiments/LOG.md), and right before CHANGES changes of the disk (6; 0 for
every one, which is there too): random moments seldom meet the milliseconds between two of them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import preloaded
from outputs import contents, differences

KILLS = int(os.environ.get("KILLS", "3"))
CHANGES = int(os.environ.get("CHANGES", "6"))
SMALL = ("--batch-size", "4", "--lora-rank", "4", "--save-steps", "2", "--learning-rate", "0.02")
IGNORED = "log.txt"  # what the runs printed


def kill(how, num_kills, folder, tiny, words, seed=0):
    """Check that killed runs leave what an unbroken one leaves; how many kills, in how many places.

    Nothing is left beside the output.
    """
    inputs = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--output", "out")
    words = (*words, *SMALL, *inputs)
    script = Path(__file__).with_name("killing.py")
    command = [preloaded.python(), "-W", "ignore", script, how, folder, num_kills, seed, *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    count = json.loads(done.stdout)
    whole = visible(folder / "whole")
    assert {Path(path).parts[0] for path in whole} == {"out"}
    for number in range(1, count["places"] + 1):
        assert differences(whole, visible(folder / str(number))) == [], number
    return count["kills"], count["places"]


def visible(place):
    return {name: held for name, held in contents(place).items() if name != IGNORED}


COMMANDS = {
    "rank": ("rank", "--max-steps", 30, "--mask-batches", 2),
    "train": ("train", "--rank-first", "--steps", 20, "--mask-batches", 2, "--controls", "random"),
}


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_run_ends_as_if_it_had_not_been(tiny, tmp_path, name):
    kills, _ = kill("moments", KILLS, tmp_path, tiny, COMMANDS[name])
    assert kills == KILLS


FEWER_STEPS = {
    "rank": ("rank", "--max-steps", 6, "--mask-batches", 2),
    "train": ("train", "--rank-first", "--steps", 8, "--mask-batches", 2, "--controls", "random"),
    "full": ("rank", "--max-steps", 4, "--mask-batches", 2, "--update", "full"),
}


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", FEWER_STEPS)
def test_so_does_one_that_is_killed_before_a_change_of_the_disk(tiny, tmp_path, name):
    kills, places = kill("changes", CHANGES, tmp_path, tiny, FEWER_STEPS[name])
    assert kills == places >= (CHANGES or 50)
