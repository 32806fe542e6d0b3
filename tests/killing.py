# SPDX-License-Identifier: Apache-2.0
"""Kill a command with SIGKILL, give it again, and say how often it was killed.

A process of its own: it imports the libraries once and forks for each run, which begins at once.

    python killing.py moments FOLDER NUM_KILLS SEED WORD...
    python killing.py changes FOLDER NUM_KILLS 0 WORD...

runs `keylayers WORD...` in FOLDER/whole unbroken and in FOLDER/1, FOLDER/2, ... with kills; the
words write to the folder that they are run in. Writes one line of JSON to stdout.

`moments` are drawn from the length of an unbroken run; every other time the run that goes on is
killed too. `changes` kills right before a change of the disk: a file opened to be written, a file
or folder made, renamed or removed. NUM_KILLS of them are spread over all that an unbroken run
makes, the last among them.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

sys.dont_write_bytecode = True  # or the first run changes the disk more often than the next
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")
num_changes = multiprocessing.RawValue("q")  # of the run that was begun last; forks share it


def watch_changes(kill_before):
    """Count changes of the disk from now on, and kill this process before one of them."""

    def see(event, details):
        is_opened = event == "open" and isinstance(details[2], int)
        is_written = is_opened and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (is_written or event in CHANGES) or str(details[0]).startswith("/dev/"):
            return
        num_changes.value += 1
        if num_changes.value == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)

    num_changes.value = 0
    sys.addaudithook(see)


def begin(place, words, log="log.txt", kill_before=None):
    """Fork a process that runs the command in `place`, and adds what it prints to `log`; its id.

    It kills itself before the change of the disk of that number, from 1; 0 only counts them.
    """
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        import torch

        torch.set_num_threads(1)  # a fork replaces torch's thread pool, safely from one thread only
        os.chdir(place)
        log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from keylayers.cli import main

        if kill_before is not None:
            watch_changes(kill_before)
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


def kill_at_moments(folder, words, num_kills, draw, length):
    """How often runs were killed in all, and in how many places in `folder`; they have ended."""
    kills = places = 0
    while kills < num_kills:
        places += 1
        place = new_place(folder, places)
        for _ in range(1 + places % 2):
            kills += killed_after(begin(place, words), draw.uniform(0, length))
            if kills == num_kills:
                break
        finish(place, words)
    return kills, places


def kill_at_changes(folder, words, num_kills):
    """The same, each killed once."""
    in_all = num_changes.value
    num_kills = num_kills or in_all
    for number in range(1, num_kills + 1):
        place = new_place(folder, number)
        child = begin(place, words, kill_before=round(number * in_all / num_kills))
        assert ended(child) == -signal.SIGKILL, f"nothing was killed in {place}"
        finish(place, words)
    return num_kills, num_kills


def new_place(folder, name):
    place = folder / str(name)
    place.mkdir(parents=True)
    return place


def finish(place, words):
    assert ended(begin(place, words)) == 0, f"the run that goes on failed in {place}"


def main():
    how, folder, num_kills, seed, *words = sys.argv[1:]
    folder, num_kills = Path(folder), int(num_kills)
    import keylayers.commands.rank_first
    import keylayers.training.rank_modules  # noqa: F401  all before the first fork

    start = time.perf_counter()
    unbroken = begin(new_place(folder, "whole"), words, kill_before=0)
    assert ended(unbroken) == 0, "the unbroken run failed"
    length = time.perf_counter() - start
    if how == "changes":
        kills, places = kill_at_changes(folder, words, num_kills)
    else:
        kills, places = kill_at_moments(folder, words, num_kills, random.Random(int(seed)), length)
    sys.stdout.write(json.dumps({"kills": kills, "places": places, "seconds": length}) + "\n")


if __name__ == "__main__":
    main()
