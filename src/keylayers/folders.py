# SPDX-License-Identifier: Apache-2.0
"""Folders that are whole or absent, and what a run that was killed has left of its work.

Needs no torch.
"""

import contextlib
import errno
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from keylayers.errors import OutputError
from keylayers.records import RECORD, cannot_write, is_first_process, remove_leftovers

FULL = (errno.ENOSPC, errno.EDQUOT)
KEPT = "but it is full; what was there is kept: make room and give the same command again"
UNFINISHED = "unfinished"  # ends the name of what a run has done so far
NEEDED_BYTES = 2**20  # a disk with less free is full: libraries write in pieces of about this size


@contextlib.contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Make `path` and prove that it can be written, before any work is done.

    If the work then fails and the folder is empty, it and the parents made for it are removed
    again.

    Raises:
        OutputError: the folder cannot be made or written.
    """
    if not is_first_process():
        yield path
        return
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        _remove_empty(made)
        raise OutputError(cannot_write(path, error)) from error
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
    temporary = _beside(path, f"{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        with one_line_if_full(path):
            yield temporary
        _take_place(temporary, path)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(cannot_write(path, error)) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(new: Path, path: Path) -> None:
    """Put `new` where `path` is; if that fails, or the process is killed, the old one is back."""
    old = _beside(path, f"{os.getpid()}.old")  # `remove_leftovers` knows the name
    try:
        if path.exists():
            path.replace(old)
        new.replace(path)
    except OSError:
        if old.exists() and not path.exists():
            old.replace(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_replaceable(path: Path) -> None:
    """Refuse to overwrite what keylayers did not make, before any work is done.

    Raises:
        OutputError: `path` is a file, a folder with other contents, or in a place that cannot be
            written.
    """
    if path.absolute().parent.is_dir() and is_first_process():
        remove_leftovers(path)
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
        raise OutputError(cannot_write(parent, error)) from error


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A folder beside `path` for what a run has done so far that is to make `path`.

    It vanishes when the block ends well, and stays for the next run if the process is killed or
    the block fails; an empty one vanishes then too. One run at a time has it.

    Raises:
        OutputError: another run is at work on `path`, or nothing can be written there.
    """
    folder = _beside(path, UNFINISHED)
    if not is_first_process():
        yield folder
        return
    try:
        with one_at_a_time(folder, path):
            yield folder
    except BaseException:
        if folder.is_dir() and not any(folder.iterdir()):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def remove_unfinished(path: Path) -> None:
    """Remove what `unfinished` left of a run that was killed when `path` was just whole.

    Raises:
        OutputError: another run is at work on `path`, or nothing can be written there.
    """
    if is_first_process() and _beside(path, UNFINISHED).is_dir():
        with unfinished(path):
            pass


@contextlib.contextmanager
def one_at_a_time(folder: Path, written: Path | None = None) -> Iterator[None]:
    """Hold `folder` for this process alone, for the length of the block; it is made if need be.

    Args:
        folder: Gets a hidden file meanwhile.
        written: What a message calls it.

    Raises:
        OutputError: another process holds it, or nothing can be written there.
    """
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(
            f"one run at a time must write to {str(written or folder)!r}, but another one is at "
            f"work on it; wait for it, or choose another folder"
        ) from error
    except OSError as error:
        raise OutputError(cannot_write(folder, error)) from error
    try:
        yield
    finally:
        (folder / ".lock").unlink(missing_ok=True)  # while it is held, so that no one else holds it
        lock.release()


@contextlib.contextmanager
def one_line_if_full(path: Path) -> Iterator[None]:
    """Say in one line that the disk of `path` is full, whichever library finds out.

    Raises:
        OutputError: it is.
    """
    try:
        yield
    except Exception as error:  # safetensors, tokenizers and torch raise their own; all go on
        if not _is_full(path, error):
            raise
        raise OutputError(f"the disk must have room for {str(path)!r}, {KEPT}") from error


def says_full(message: str) -> bool:
    """Whether this is what a run said, in one way or another, when the disk was full."""
    return message.endswith(KEPT) or any(os.strerror(number) in message for number in FULL)


def _is_full(path: Path, error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL
    if says_full(str(error)):
        return True
    *_, (last, _) = traceback.walk_tb(error.__traceback__)
    is_written_by_torch = last.f_globals.get("__name__") == "torch.serialization"
    return is_written_by_torch and not _has_room(path)  # torch says something about positions


def _has_room(path: Path) -> bool:
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(bytes(NEEDED_BYTES))
    except OSError as error:
        return error.errno not in FULL
    return True


def _beside(path: Path, suffix: str) -> Path:
    """A hidden neighbour of `path`, on the same disk."""
    path = path.absolute()
    return path.with_name(f".{path.name}.{suffix}")


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders, innermost first, as long as they are empty."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
