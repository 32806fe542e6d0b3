# SPDX-License-Identifier: Apache-2.0
"""The stand-in for Python ends, is killed and reads its environment as Python does."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import preloaded

# code, what is on standard input -> exit code, output, last line of errors
RUNS = [
    ("import sys; print(sys.stdin.read(), sys.argv[1:])", "in", 0, "in ['a']\n", None),
    ("import sys; print('torch' in sys.modules)", "", 0, "True\n", None),
    ("import sys; print('keylayers' in sys.modules)", "", 0, "False\n", None),
    ("import sys; sys.exit(3)", "", 3, "", None),
    ("import sys; sys.exit('no')", "", 1, "", "no"),
    ("raise ValueError('x')", "", 1, "", "ValueError: x"),
    ("import os; os.kill(os.getpid(), 9)", "", -9, "", None),
    ("raise KeyboardInterrupt", "", -2, "", "KeyboardInterrupt"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "given", "ends", "out", "err"), RUNS)
def test_it_ends_as_python_does(code, given, ends, out, err):
    command = [preloaded.python(), "-W", "ignore", "-c", code, "a"]
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (ends, out)
    assert (done.stderr.splitlines() or [None])[-1] == err


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_reaches_the_process_that_does_the_work(number):
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    process = subprocess.Popen([preloaded.python(), "-c", code], stdout=subprocess.PIPE, text=True)
    worker = Path("/proc") / process.stdout.readline().strip()
    assert worker.exists()
    process.send_signal(number)
    assert process.wait(10) == -number
    process.stdout.close()
    deadline = time.monotonic() + 10
    while worker.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not worker.exists()


@pytest.mark.parametrize(("name", "is_fork"), [("OWN_VARIABLE", True), ("PYTHONHASHSEED", False)])
def test_what_libraries_read_while_they_are_imported_needs_real_python(name, is_fork):
    code = f"import os, sys; print(os.environ[{name!r}], 'torch' in sys.modules, os.getcwd())"
    command = [preloaded.python(), "-c", code]
    shown = subprocess.check_output(command, env=os.environ | {name: "7"}, text=True, cwd="/")
    assert shown.split() == ["7", str(is_fork), "/"]
