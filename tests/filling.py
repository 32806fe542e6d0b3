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
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

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
        for name, content in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {user} 1"),
            ("gid_map", f"0 {group} 1"),
        ):
            Path(f"/proc/self/{name}").write_text(content)
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)


def mount(disk, size, *more):
    options = ",".join((f"size={size}", *more))
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)


def unmount(disk, copy):
    shutil.copytree(disk, copy)
    subprocess.run(["umount", "--lazy", disk], check=True)


def command(place, words, log):
    import torch

    from keylayers.cli import main

    torch.set_num_threads(1)  # a fork replaces torch's thread pool, safely from one thread only
    os.chdir(place)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(main(words))


def run(disk, words, log):
    """The exit code of a command that runs on the disk, and the most bytes that it held at once."""
    child = multiprocessing.get_context("fork").Process(target=command, args=(disk, words, log))
    child.start()
    most = 0
    while child.is_alive():
        counts = os.statvfs(disk)
        most = max(most, (counts.f_blocks - counts.f_bfree) * counts.f_frsize)
        time.sleep(0.005)
    return child.exitcode, most


def main():
    folder, shares, *words = sys.argv[1:]
    folder = Path(folder)
    log, disk = folder / "log.txt", folder / "disk"
    disk.mkdir(parents=True)
    own_mounts()
    import keylayers.commands.rank_first
    import keylayers.commands.run_rank  # noqa: F401  all before the first fork

    mount(disk, ROOM)
    code, most = run(disk, words, log)
    assert code == 0, log.read_text()
    unmount(disk, folder / "whole")
    told = []
    for number, share in enumerate(map(float, shares.split(",")), 1):
        mount(disk, max(1, int(share * most / PAGE)) * PAGE)
        first, _ = run(disk, words, log)
        printed = log.read_text()
        shutil.copytree(disk, folder / f"full-{number}")
        mount(disk, ROOM, "remount")
        second, _ = run(disk, words, log)
        unmount(disk, folder / str(number))
        told.append({"share": share, "codes": [first, second], "printed": printed})
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    main()
