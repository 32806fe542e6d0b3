# SPDX-License-Identifier: Apache-2.0
"""Run a command of keylayers in a process that ends without warning.

    python killing.py moment SECONDS WORD...
    python killing.py change NUMBER WORD...

It ends after so many seconds, or right before the change of the disk of that number: a file opened
to be written, a file or folder made, renamed or removed. With 0 it is not killed; its last line on
stdout then says how long it took and how many changes it made.
"""

import json
import os
import signal
import sys
import time

sys.dont_write_bytecode = True  # or the first run changes the disk more often than the next
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")
told = {"changes": 0}


def watch_changes(kill_before):
    """Count changes of the disk from now on, and kill this process before one of them."""

    def see(event, details):
        is_opened = event == "open" and isinstance(details[2], int)
        is_written = is_opened and details[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (is_written or event in CHANGES) or str(details[0]).startswith("/dev/"):
            return
        told["changes"] += 1
        if told["changes"] == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(see)


def main():
    how, at, *words = sys.argv[1:]
    import keylayers.commands.rank_first
    import keylayers.commands.run_rank  # all imports before the clock starts
    from keylayers.cli import main as keylayers

    start = time.perf_counter()
    if how == "change":
        watch_changes(int(at))
    else:
        signal.setitimer(signal.ITIMER_REAL, float(at))  # SIGALRM ends a process like SIGKILL
    code = keylayers(words)
    told["seconds"] = time.perf_counter() - start
    sys.stdout.write(json.dumps(told) + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
