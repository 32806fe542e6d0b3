# SPDX-License-Identifier: Apache-2.0
"""Kill `keylayers judge` with SIGKILL at given counts of replies, then let it end.

A process of its own, as killing.py is: it imports the libraries once and forks for each run.

    python judge_killed.py FOLDER REPLIES COUNTS WORD...

runs `keylayers WORD...` in FOLDER, kills it once the file REPLIES has the first of COUNTS (such as
2,5) lines, again at the second, and so on; its exit code is that of the run that is left alone.
"""

import os
import signal
import sys
import time
from pathlib import Path

from killing import begin, ended

WAIT_SECONDS = 240


def count_lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main():
    folder, replies, counts, *words = sys.argv[1:]
    import keylayers.runs.judge  # noqa: F401  before the first fork

    for count in map(int, counts.split(",")):
        child = begin(Path(folder), words)
        end = time.monotonic() + WAIT_SECONDS
        while count_lines(Path(replies)) < count and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL, "it was not at work any more"
    return ended(begin(Path(folder), words))


if __name__ == "__main__":
    sys.exit(main())
