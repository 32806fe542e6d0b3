# SPDX-License-Identifier: Apache-2.0
"""Kill a command with SIGKILL at random moments, give it again, and say how often it was killed.

A process of its own: it imports the libraries once and forks for each run, which begins at once.
A run is killed at a moment drawn from the length of an unbroken one; every other time the run that
goes on is killed too.

    python killing.py FOLDER NUM_KILLS SEED WORD...

runs `keylayers WORD...` in FOLDER/whole unbroken and in FOLDER/1, FOLDER/2, ... with kills; the
words write to the folder that they are run in. Writes one line of JSON to stdout.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path


def begin(place, words, log="log.txt"):
    """Fork a process that runs the command in `place`, and adds what it prints to `log`; its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.chdir(place)
        log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from keylayers.cli import main

        code = main(words)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child):
    """Its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_after(child, seconds):
    """Kill it after so long; whether it was still at work."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return ended(child) == -signal.SIGKILL


def main():
    folder, num_kills, seed, *words = sys.argv[1:]
    folder, draw = Path(folder), random.Random(int(seed))
    import keylayers.runs.rank
    import keylayers.runs.train  # noqa: F401  both before the first fork

    (folder / "whole").mkdir(parents=True)
    start = time.perf_counter()
    assert ended(begin(folder / "whole", words)) == 0, "the unbroken run failed"
    length = time.perf_counter() - start
    kills = places = 0
    while kills < int(num_kills):
        places += 1
        place = folder / str(places)
        place.mkdir()
        for _ in range(1 + places % 2):
            child = begin(place, words)
            kills += killed_after(child, draw.uniform(0, length))
            if kills == int(num_kills):
                break
        assert ended(begin(place, words)) == 0, f"the run that goes on failed in {place}"
    sys.stdout.write(json.dumps({"kills": kills, "places": places, "seconds": length}) + "\n")


if __name__ == "__main__":
    main()
