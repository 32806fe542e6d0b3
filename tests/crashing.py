# SPDX-License-Identifier: Apache-2.0
"""Run a command of keylayers in a process that is killed, or on a disk that is too small.

    python crashing.py moment SECONDS WORD...
    python crashing.py change NUMBER WORD...
    python crashing.py room BYTES WORD...

With `moment` the process is killed after SECONDS, with `change` right before change NUMBER of the
disk: opening a file to write it, or making, renaming or removing a file or folder. With 0 it is not
killed; its last line on stdout then says how long it took and how many changes it made.

With `room` the working folder is a disk in memory that only this process sees; what it holds in the
end is copied to FOLDER.full.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.dont_write_bytecode = True  # or the first run changes the disk more often than the next
CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree")
NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000  # flags of unshare(2); os.unshare is new in Python 3.12
NO_MOUNTS = 77  # exit code where no disk may be mounted
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


def mount_here(size):
    """Make the working folder a disk of that size, in a mount namespace of this process."""
    user, group = os.geteuid(), os.getegid()
    if ctypes.CDLL(None).unshare(NEW_MOUNTS | (NEW_USER if user else 0)):
        sys.exit(NO_MOUNTS)
    if user:  # be root in it
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    for words in (["--make-rprivate", "/"], ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", "."]):
        if subprocess.run(["mount", *words]).returncode:
            sys.exit(NO_MOUNTS)
    os.chdir(os.getcwd())


def main():
    how, at, *words = sys.argv[1:]
    place = os.getcwd()
    if how == "room":
        mount_here(at)
    import keylayers.commands.run_rank  # all imports before the clock starts
    import keylayers.commands.run_train
    from keylayers.cli import main as keylayers

    start = time.perf_counter()
    if how == "change":
        watch_changes(int(at))
    elif how == "moment":
        signal.setitimer(signal.ITIMER_REAL, float(at))  # SIGALRM ends a process like SIGKILL
    code = keylayers(words)
    told["seconds"] = time.perf_counter() - start
    if how == "room":
        shutil.copytree(place, f"{place}.full")
    sys.stdout.write(json.dumps(told) + "\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
