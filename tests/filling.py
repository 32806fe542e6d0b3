# SPDX-License-Identifier: Apache-2.0
"""Run a command on disks too small for it, make room, give it again, and say how that went.

A process of its own in a mount namespace of its own: it imports the libraries once and forks for
each run, and its disks are memory.

    python filling.py FOLDER SHARE,SHARE,... WORD...

runs `keylayers WORD...` on a disk with room, kept in FOLDER/whole, and for each share on one of
that share of what the first needed at most; what a full disk held is kept in FOLDER/full-1, ...,
and what it held after more room and the same command in FOLDER/1, ...  The words write to the
folder that they are run in. Writes one line of JSON to stdout: for each share the exit codes, and
what was printed while the disk was full.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from killing import begin, ended

ROOM = "256m"
PAGE = 4096  # what tmpfs counts in


NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000  # flags of unshare(2); os.unshare is new in Python 3.12


def own_mounts():
    """Give this process a mount namespace of its own, as `unshare --mount` does."""
    user, group = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS | (NEW_USER if user else 0)):
        raise OSError(ctypes.get_errno(), "no mount namespace")
    if user:  # be root in it
        for name, content in (("setgroups", "deny"), ("uid_map", user), ("gid_map", group)):
            content = content if name == "setgroups" else f"0 {content} 1"
            Path(f"/proc/self/{name}").write_text(content)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def mount(disk, size, *more):
    options = ",".join((f"size={size}", *more))
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)


def used(disk):
    counts = os.statvfs(disk)
    return (counts.f_blocks - counts.f_bfree) * counts.f_frsize


def most_used(disk, words):
    """The exit code of a run, and the most bytes that it held at once."""
    most, is_over = [0], threading.Event()

    def watch():
        while not is_over.is_set():
            most[0] = max(most[0], used(disk))
            time.sleep(0.005)

    child = begin(disk, words, disk.with_name("log.txt"))
    watcher = threading.Thread(target=watch)
    watcher.start()
    code = ended(child)
    is_over.set()
    watcher.join()
    return code, most[0]


def main():
    folder, shares, *words = sys.argv[1:]
    folder = Path(folder)
    log, disk = folder / "log.txt", folder / "disk"
    disk.mkdir(parents=True)
    own_mounts()
    import keylayers.commands.rank_first
    import keylayers.training.rank_modules  # noqa: F401  all before the first fork

    mount(disk, ROOM)
    code, most = most_used(disk, words)
    assert code == 0, log.read_text()
    shutil.copytree(disk, folder / "whole")
    subprocess.run(["umount", "--lazy", disk], check=True)
    told = []
    for number, share in enumerate(map(float, shares.split(",")), 1):
        mount(disk, max(1, int(share * most / PAGE)) * PAGE)
        log.unlink()
        first = ended(begin(disk, words, log))
        printed = log.read_text()
        shutil.copytree(disk, folder / f"full-{number}")
        mount(disk, ROOM, "remount")
        second = ended(begin(disk, words, log))
        shutil.copytree(disk, folder / str(number))
        subprocess.run(["umount", "--lazy", disk], check=True)
        told.append({"share": share, "codes": [first, second], "printed": printed})
    sys.stdout.write(json.dumps({"bytes": most, "runs": told}) + "\n")


if __name__ == "__main__":
    main()
