# SPDX-License-Identifier: Apache-2.0
"""What keylayers writes down: JSON files that are never half written, and what made them.

Needs no torch. Every record says which versions, which commit and which machine it comes from, and
never holds an environment variable or a token.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from keylayers._version import __version__
from keylayers.errors import ConfigError, OutputError

RECORD = "keylayers.json"  # beside every adapter and checkpoint that keylayers writes
CARD = "README.md"  # the same for readers: the model card of the hub
STAGE_1_ADAPTER = "adapter"  # the folder that `rank` leaves beside ranking.json
STAGE_1_CHECKPOINT = "tuned"  # the same after a full fine-tune
CLOCK_SECONDS = 10.0  # by which the clocks of processes and files may differ
PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s@]+@")
RECORDED_LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
)


def is_first_process() -> bool:
    """Whether this process is the one that writes and speaks, of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def num_launched() -> int:
    """How many processes a launcher started for this run; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def wrapper() -> str | None:
    """What a launcher asked accelerate to spread a model's training with, beside DDP."""
    names = ("FSDP", "DEEPSPEED")
    return next((one for one in names if os.environ.get(f"ACCELERATE_USE_{one}") == "true"), None)


def environment() -> dict[str, Any]:
    """The software, the kind of machine and the processes that a result comes from."""
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

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        is_dirty = bool(git("status", "--porcelain", "--untracked-files=no", "--", "src"))
    except (OSError, subprocess.CalledProcessError):
        return None  # no git on this machine, or not allowed to read the folder
    return commit + ("+dirty" if is_dirty else "")


def json_sha256(content: Any) -> str:
    """The SHA-256 of `content` as canonical JSON (sorted keys), in hexadecimal."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` whole or not at all.

    Raises:
        OutputError: the place cannot be written; what was there before is untouched.
    """
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        write_text(path, text + "\n")
    except UnicodeEncodeError:  # half a character, which JSON holds as an escape and UTF-8 does not
        write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all.

    Raises:
        OutputError: the place cannot be written; what was there before is untouched.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` whole or not at all; of several processes only the first writes.

    Raises:
        OutputError: the place cannot be written; what was there before is untouched.
    """
    if not is_first_process():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        remove_leftovers(path)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(cannot_write(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove what processes that were killed left beside `path` when they were about to write it.

    What they had moved aside takes its place again.
    """
    path = path.absolute()
    for name in os.listdir(path.parent):
        match = re.fullmatch(re.escape(f".{path.name}.") + r"(\d+)\.(tmp|old)", name)
        left = path.parent / name
        if match is None or _is_at_work(int(match[1]), left):
            continue
        if match[2] == "old" and not path.exists():
            left.replace(path)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _is_at_work(process_id: int, left: Path) -> bool:
    """Whether another process is about to put `left` in its place.

    The number alone does not tell: a container starts the same command under the same number each
    time, and what was killed keeps its number until its parent asks how it ended.
    """
    import psutil  # only where something is left: `--help` is to be quick

    if process_id == os.getpid():
        return False
    try:
        process = psutil.Process(process_id)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return bool(process.create_time() < left.stat().st_mtime + CLOCK_SECONDS)
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
    except psutil.Error:  # somebody else's
        return True


def check_no_password(text: str, name: str) -> None:
    """Refuse what would be recorded, shown and logged with a password in it.

    Args:
        text: An option.
        name: What the message calls it, for it does not show the text.

    Raises:
        ConfigError: there is an address with one, as in `https://user:password@host`.
    """
    if PASSWORD.search(text):
        raise ConfigError(
            f"{name} must hold no password, since options are recorded, but has an address with "
            f"one (user:password@); give it through the environment or a file of its own"
        )


def cannot_write(path: Path, error: OSError) -> str:
    """What an error says when `path` cannot be written."""
    reason = error.strerror or str(error)
    return f"the output must be a place that can be written, but {str(path)!r} is not: {reason}"
