# SPDX-License-Identifier: Apache-2.0
"""A full disk is one line and exit code 2; what was there is kept, and with room the run goes on.

The disks are real ones in memory, of FULL_SHARES of what an unbroken run needs (a few unless the
environment says otherwise; a longer list is in experiments/LOG.md).
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import preloaded
from outputs import contents, differences
from studies import METHODS, tiny_study
from test_kill import COMMANDS, command_on

# Of a study: what its cells said and how long they took is in these.
UNLIKE = ("log.txt", "results.csv", "results.parquet", "report.html")
SHARES = os.environ.get("FULL_SHARES")
NAMESPACE = ("unshare", "--mount", *(() if os.geteuid() == 0 else ("--user", "--map-root-user")))


def may_mount():
    if shutil.which("unshare") is None:
        return False
    command = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not may_mount(), reason="needs a system on which a tmpfs may be mounted"),
]


def check(folder, shares, words):
    """One line while it is full, nothing half written, and the same in the end.

    `train` writes what it trained with its record and card first, and replaces these two for each
    control.
    """
    script = Path(__file__).with_name("filling.py")
    command = [preloaded.python(), "-W", "ignore", script, folder, SHARES or shares, *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    whole = compared(folder / "whole")
    assert {Path(path).parts[0] for path in whole} == {"out"}
    for number, told in enumerate(json.loads(done.stdout), 1):
        share, printed = told["share"], told["printed"]
        assert told["codes"] == [2, 0], (share, printed[-1500:])
        [line] = [line for line in printed.splitlines() if line.startswith("keylayers: ")]
        assert "it is full; what was there is kept" in line or "No space left" in line
        assert "Traceback" not in printed
        full = folder / f"full-{number}"
        for path in [path for path in full.rglob(".*") if path.is_dir()]:
            shutil.rmtree(path, ignore_errors=True)  # unfinished work
        for path, held in compared(full).items():
            if Path(path).name == "keylayers.json" and held != whole[path]:
                results = held["results"]
                assert results == whole[path]["results"][: len(results)], share
            elif Path(path).name != "README.md":
                assert held == whole[path], share
        assert differences(whole, compared(folder / str(number))) == [], share


def compared(folder):
    """Path -> content of what is the same in every run."""
    return {
        path: content for path, content in contents(folder).items() if Path(path).name not in UNLIKE
    }


@pytest.mark.parametrize(("name", "shares"), [("rank", "0,0.3,0.5,0.9"), ("train", "0.1,0.5,0.95")])
def test_a_run_on_a_full_disk_goes_on_when_there_is_room(tiny, tmp_path, name, shares):
    check(tmp_path, shares, command_on(tiny, COMMANDS[name]))


def test_a_study_on_a_full_disk_goes_on_when_there_is_room(tiny, tmp_path):
    path = tiny_study(tmp_path / "file", tiny, seed=[0], method=METHODS[:1], budget=[0.2])
    words = ("study", path, "--output", "out", "--workers", "1")
    check(tmp_path / "runs", "0.7", words)
