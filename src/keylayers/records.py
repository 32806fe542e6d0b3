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
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from keylayers._version import __version__
from keylayers.errors import OutputError

RECORD = "keylayers.json"  # beside every adapter and checkpoint that keylayers writes
CARD = "README.md"  # the same for readers: the model card of the hub
STAGE_1_ADAPTER = "adapter"  # the folder that `rank` leaves beside ranking.json
STAGE_1_CHECKPOINT = "tuned"  # the same after a full fine-tune
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


def environment() -> dict[str, Any]:
    """The software and the kind of machine that a result comes from, for its record."""
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
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    if not _is_unicode(text):
        text = json.dumps(content, indent=2, allow_nan=False)
    write_text(path, text + "\n")


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 holds it; JSON also allows halves of characters, as escapes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all.

    Raises:
        OutputError: the place cannot be written; what was there before is untouched.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` whole or not at all.

    Raises:
        OutputError: the place cannot be written; what was there before is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(_cannot_write(path, error)) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Make `path` and prove that it can be written, before any work is done.

    If the work then fails and the folder is empty, it and the parents made for it are removed
    again.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        _remove_empty(made)
        raise OutputError(_cannot_write(path, error)) from error
    try:
        yield path
    except BaseException:
        _remove_empty(made)
        raise


@contextlib.contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A folder that takes the place of `path` when the block ends well and vanishes if not.

    Only a folder that keylayers made (it holds keylayers.json) is replaced.

    Raises:
        OutputError: the folder cannot be made or moved, or holds something else.
    """
    check_replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.replace(old)
        temporary.replace(path)
    except OSError as error:
        if old.exists() and not path.exists():
            old.replace(path)
        raise OutputError(_cannot_write(path, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_replaceable(path: Path) -> None:
    """Refuse to overwrite what keylayers did not make, before any work is done.

    Raises:
        OutputError: `path` is a file, a folder with other contents, or in a place that cannot be
            written.
    """
    if path.is_file():
        raise OutputError(f"the output must be a folder, but {str(path)!r} is a file")
    if path.is_dir() and any(path.iterdir()) and not (path / RECORD).is_file():
        raise OutputError(
            f"the output must be new, empty or made by keylayers, but {str(path)!r} holds other "
            f"files; choose another folder"
        )
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):  # the new folder is made beside the old one
            pass
    except OSError as error:
        raise OutputError(_cannot_write(parent, error)) from error


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, as long as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _cannot_write(path: Path, error: OSError) -> str:
    reason = error.strerror or str(error)
    return f"the output must be a place that can be written, but {str(path)!r} is not: {reason}"
