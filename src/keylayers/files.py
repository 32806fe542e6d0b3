# SPDX-License-Identifier: Apache-2.0
"""Files and folders that are whole or absent, and the unfinished work of a stopped run.

Everything is written under a hidden name next to its final place and then renamed, so `kill -9` at
any moment leaves the old content or the new. Long work holds a lock that dies with its process.
Needs no torch.
"""

import contextlib
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from keylayers.environment import is_first_process
from keylayers.errors import KeylayersError, OutputError

RECORD = "keylayers.json"  # in every adapter and checkpoint that keylayers writes
CARD = "README.md"  # the model card next to it
STAGE_1_ADAPTER = "adapter"  # the folder that `rank` leaves next to ranking.json
STAGE_1_CHECKPOINT = "tuned"  # the same after a full fine-tune
FULL = (errno.ENOSPC, errno.EDQUOT)
WHAT_TO_DO = "but it is full; what was there is kept: make room and run the same command again"
NEEDED_BYTES = 2**20  # libraries write in pieces of about this size


def json_sha256(content: Any) -> str:
    """The SHA-256 of `content` as canonical JSON (sorted keys), in hexadecimal."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` to `path` whole or not at all, as `write_bytes` does."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # Half a surrogate pair is escaped as JSON does it: UTF-8 cannot hold it.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all, as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` whole or not at all; only the first of several processes writes."""
    if not is_first_process():
        return
    temporary = _hidden(path, f"{secrets.token_hex(4)}.tmp")
    try:
        with _written(path):
            for left in path.parent.glob(f".{glob.escape(path.name)}.????????.tmp"):
                left.unlink(missing_ok=True)  # a killed run was about to rename it
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Make `path` and prove that it can be written, before any work is done.

    If the block fails and the folder is empty, it is removed again with the parents made for it.
    A disk that was full during the block raises an OutputError.
    """
    if not is_first_process():
        yield path
        return
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        with _written(path):
            path.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=path).close()
        yield path
    except BaseException as error:
        is_full = isinstance(error, Exception) and _is_full(path, error)
        with contextlib.suppress(OSError):  # not empty
            for folder in made:
                folder.rmdir()
        if is_full:
            raise OutputError(f"the disk must have room for {str(path)!r}, {WHAT_TO_DO}") from error
        raise


def check_replaceable(path: Path) -> None:
    """Refuse to overwrite what keylayers did not make, before any work is done."""
    if path.is_file():
        raise OutputError(f"the output must be a folder, but {str(path)!r} is a file")
    if path.is_dir() and any(path.iterdir()) and not (path / RECORD).is_file():
        raise OutputError(
            f"the output must be new, empty or made by keylayers, but {str(path)!r} holds other "
            f"files; choose another folder"
        )
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    with _written(parent):  # the new folder is built next to the old one
        tempfile.TemporaryFile(dir=parent).close()


@contextlib.contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """A hidden folder that takes the place of `path` if the block succeeds, and vanishes if not.

    Only a folder that keylayers made (it holds keylayers.json) is replaced. Call it inside
    `unfinished(path)`, which cleans up after a killed run and keeps other runs out.
    """
    check_replaceable(path)
    new = _hidden(path, "new")
    try:
        with _written(path):
            new.mkdir(parents=True)
            yield new
            if path.exists():
                path.replace(_hidden(path, "old"))
            new.replace(path)
    finally:
        _end_replacing(path)


def _end_replacing(path: Path) -> None:
    """Remove what is left of a replacement; put the old folder back if the new one did not come."""
    old = _hidden(path, "old")
    if old.exists() and not path.exists():
        old.replace(path)
    for left in (old, _hidden(path, "new")):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A hidden folder next to `path` for the unfinished work of the run that will write `path`.

    It is removed if the block succeeds. It stays for the next run if the process is killed or the
    block fails, unless it is empty. Only one run at a time holds it, as in `one_at_a_time`.
    """
    folder = _hidden(path, "unfinished")
    if not is_first_process():
        yield folder
        return
    try:
        with one_at_a_time(folder, path):
            _end_replacing(path)
            yield folder
            shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()
        raise


def remove_unfinished(path: Path) -> None:
    """Remove what is left of a run that was killed right after it completed `path`.

    Several runs may read `path` at the same time, so it is held only if something is left.
    """
    if is_first_process() and _hidden(path, "unfinished").is_dir():
        with unfinished(path):
            pass


@contextlib.contextmanager
def one_at_a_time(folder: Path, written: Path | None = None) -> Iterator[None]:
    """Hold `folder`, which is made if needed, for this process alone during the block.

    The error that another process holds it names `written`, or else the folder.
    """
    from filelock import FileLock, Timeout  # imports asyncio, which `--help` can do without

    lock = FileLock(folder / ".lock")
    with _written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(
                f"one run at a time must write to {str(written or folder)!r}, but another one is "
                f"at work on it; wait for it, or choose another folder"
            ) from error
    try:
        yield
    finally:
        (folder / ".lock").unlink(missing_ok=True)  # while it is held, so nobody else's is removed
        lock.release()


def distinct_ends(paths: Sequence[Sequence[str]], taken: str = "") -> list[str] | None:
    """A name for each path: as few of its last parts as tell all apart. None if paths are equal."""
    for length in range(1, max(map(len, paths), default=0) + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len({*names, taken}) == len(names) + 1:
            return names
    return None


def says_full(message: str) -> bool:
    """Whether a message reports a full disk."""
    return message.endswith(WHAT_TO_DO) or any(os.strerror(code) in message for code in FULL)


@contextlib.contextmanager
def _written(path: Path) -> Iterator[None]:
    """Turn the system's errors into one that says that `path` cannot be written."""
    try:
        yield
    except KeylayersError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"the output must be a place that can be written, but {str(path)!r} is not: {reason}"
        ) from error


def _is_full(path: Path, error: Exception) -> bool:
    """Whether a full disk is the reason for `error`."""
    # safetensors 0.8 and tokenizers 0.23 quote the system's message in exceptions of their own. The
    # file writer of torch 2.13 only reports unexpected positions, so the disk decides.
    if isinstance(error, (KeylayersError, OSError)) or says_full(str(error)):
        return says_full(str(error))
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free < NEEDED_BYTES


def _hidden(path: Path, suffix: str) -> Path:
    """A hidden neighbour of `path`, on the same disk."""
    path = path.absolute()
    return path.with_name(f".{path.name}.{suffix}")
