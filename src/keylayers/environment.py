# SPDX-License-Identifier: Apache-2.0
"""What a record says about where a result comes from: versions, commit, machine and launcher.

Needs no torch. A record never holds an environment variable or a token.
"""

import contextlib
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from keylayers._version import __version__
from keylayers.errors import ConfigError

PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
RECORDED_LIBRARIES = (
    *("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers"),
    "safetensors",
)


def is_first_process() -> bool:
    """Whether this process writes files and messages; a launcher's other processes stay silent."""
    return os.environ.get("RANK", "0") == "0"


def num_launched() -> int:
    """How many processes a launcher started for this run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wrapper() -> str | None:
    """`FSDP` or `DEEPSPEED` if a launcher asked accelerate for it; None for DDP or no launcher."""
    names = ("FSDP", "DEEPSPEED")
    return next(
        (name for name in names if os.environ.get(f"ACCELERATE_USE_{name}") == "true"), None
    )


def environment() -> dict[str, Any]:
    """The software, the machine type and the processes that a result comes from."""
    versions = {}
    for library in RECORDED_LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[library] = metadata.version(library)
    return {
        "keylayers": __version__,
        "commit": source_commit(),
        "python": platform.python_version(),
        "libraries": versions,
        "machine": platform.machine(),
        "system": platform.system(),
        "num_processes": num_launched(),
        "wrapper": wrapper(),
    }


def source_commit() -> str | None:
    """The commit of keylayers' own source, `+dirty` if changed; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    command = ["git", "status", "--porcelain=v2", "--branch", "--untracked-files=no", "--", "src"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # git is not installed, or refuses to read the folder
    commit, *others = done.stdout.splitlines()
    is_dirty = not all(line.startswith("#") for line in others)
    return commit.removeprefix("# branch.oid ") + ("+dirty" if is_dirty else "")


def check_no_password(text: str, name: str) -> None:
    """Refuse a text with `user:password@` in an address; the message only calls it `name`."""
    if PASSWORD.search(text):
        raise ConfigError(
            f"{name} must hold no password, since options are recorded, but has an address with "
            f"one (user:password@); give it through the environment or a file of its own"
        )
