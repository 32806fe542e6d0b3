# SPDX-License-Identifier: Apache-2.0
"""A command that was killed, or whose disk was full, ends as if nothing had been.

Each command is killed right before KILLS changes of the disk (3 unless the environment says
otherwise, 0 for every one), and the run that goes on is killed too; disks are of FULL_SHARES of
what a whole run leaves. Longer lists are in experiments/LOG.md.
"""

import json
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

import preloaded
from commands import with_path
from crashing import NO_MOUNTS
from outputs import contents, differences
from studies import METHODS, write

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
KILLS = int(os.environ.get("KILLS", "3"))
SMALL = ("--batch-size", "4", "--lora-rank", "4")
TRAINS = (*SMALL, "--save-steps", "2", "--learning-rate", "0.02")
# Files of a study that hold the output of its cells, or how long they took
UNLIKE = ("log.txt", "results.csv", "results.parquet", "report.html")
COMMANDS = {
    "rank": ("rank", "--max-steps", 6, "--mask-batches", 2, *TRAINS),
    "train": (
        *("train", "--rank-first", "--steps", 8, "--mask-batches", 2, "--controls", "random"),
        *TRAINS,
    ),
    "full": ("rank", "--max-steps", 4, "--mask-batches", 2, "--update", "full", *TRAINS),
    "extract": (
        *("extract", "--tuned", "TUNED", "--budget", "0.3x-params", "--mask-batches", 2),
        *SMALL,
    ),
}


def command_on(tiny, words):
    inputs = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--output", "out")
    files = {"TUNED": tiny / "tuned"}
    return [str(files.get(word, word)) for word in (*words, *inputs)]


def run(place, words, how="change", at=0):
    """Run the command in `place`, in a process that is killed unless `at` is 0."""
    place.mkdir(exist_ok=True)
    script = str(Path(__file__).with_name("crashing.py"))
    return subprocess.run(
        [preloaded.python(), "-W", "ignore", script, how, str(at), *words],
        cwd=place,
        capture_output=True,
        text=True,
        env=with_path(),
    )


def finished(place, words):
    """What a run that is not killed leaves in `place`, and what it tells."""
    done = run(place, words)
    assert done.returncode == 0, done.stderr[-2000:]
    left = compared(place)
    assert {Path(path).parts[0] for path in left} == {"out"}
    return left, json.loads(done.stdout.splitlines()[-1])


def compared(place):
    """Path -> content of what is the same in every run."""
    return {path: held for path, held in contents(place).items() if Path(path).name not in UNLIKE}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_run_ends_as_if_it_had_not_been(tiny, tmp_path, name):
    words = command_on(tiny, COMMANDS[name])
    whole, told = finished(tmp_path / "whole", words)
    assert told["changes"] >= 50
    draw, rounds = random.Random(0), KILLS or told["changes"]
    for number in range(1, rounds + 1):
        place, at = tmp_path / str(number), round(number * told["changes"] / rounds)
        assert run(place, words, "change", at).returncode == -signal.SIGKILL
        moment = ("moment", draw.uniform(0.001, told["seconds"] / 2))
        again = moment if number % 2 else ("change", draw.randint(1, told["changes"] // 2))
        code = run(place, words, *again).returncode
        assert code in (0, -signal.SIGKILL, -signal.SIGALRM)
        assert differences(whole, finished(place, words)[0]) == [], (at, again)


def check_full(folder, shares, words):
    """One line while it is full, nothing half written, and the same when there is room."""
    whole, _ = finished(folder / "whole", words)
    size = sum(path.stat().st_size for path in (folder / "whole").rglob("*") if path.is_file())
    for share in os.environ.get("FULL_SHARES", shares).split(","):
        place, full = folder / share, folder / f"{share}.full"
        done = run(place, words, "room", max(4096, int(float(share) * size)))
        if done.returncode == NO_MOUNTS:
            pytest.skip("needs a system on which a tmpfs may be mounted")
        assert done.returncode == 2, (share, done.stderr[-1500:])
        [line] = [line for line in done.stderr.splitlines() if line.startswith("keylayers: ")]
        assert "it is full; what was there is kept" in line or "No space left" in line
        assert "Traceback" not in done.stderr
        again, _ = finished(shutil.copytree(full, place, dirs_exist_ok=True), words)
        assert differences(whole, again) == [], share
        for path in [path for path in full.rglob(".*") if path.is_dir()]:
            shutil.rmtree(path, ignore_errors=True)  # unfinished work
        for path, held in compared(full).items():
            # `train` writes record and card before its controls, and replaces them after each
            if Path(path).name == "keylayers.json" and held != whole[path]:
                results = held["results"]
                assert results == whole[path]["results"][: len(results)], share
            elif Path(path).name not in ("README.md", "cell.json"):  # a cell says that it failed
                assert held == whole[path], share


@pytest.mark.parametrize(("name", "shares"), [("rank", "0,0.5,0.9"), ("train", "0.1,0.5,0.95")])
def test_a_run_on_a_full_disk_goes_on_when_there_is_room(tiny, tmp_path, name, shares):
    check_full(tmp_path, shares, command_on(tiny, COMMANDS[name]))


def test_so_does_a_study(tiny, tmp_path):
    options = {"model": str(tiny / "model"), "data": str(tiny / "data.jsonl"), "max_steps": 6}
    path = write(tmp_path / "file", options=options, grid={"method": METHODS[:1]}, verify=False)
    check_full(tmp_path, "0.7", ["study", str(path), "--output", "out", "--workers", "1"])
