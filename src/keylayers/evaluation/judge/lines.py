# SPDX-License-Identifier: Apache-2.0
"""A file of JSON lines that grows line by line, and of which a killed run leaves whole lines only.

Needs no torch.
"""

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from keylayers.errors import OutputError
from keylayers.files import cannot_write


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a file, and how many others hold something else.

    A last line without its end was being written when a run was killed; it counts as neither.

    Raises:
        OutputError: the file is there but cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise OutputError(
            f"{str(path)!r} must be readable, but is not: {error.strerror}"
        ) from error
    rows, num_damaged = [], 0
    for line in content.split(b"\n")[:-1]:
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # fails for half a character
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            num_damaged += 1
    return rows, num_damaged


class LineFile:
    """Adds lines to a file, each at once and whole; several threads may do so.

    Args:
        path: New, or a file of lines; a last line that was not finished is cut off.

    Raises:
        OutputError: the place cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._is_closed = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            self._end = _end_of_whole_lines(self._file)
            os.ftruncate(self._file, self._end)
        except OSError as error:
            raise OutputError(cannot_write(path, error)) from error

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one line, so that it is on the disk when this returns.

        Raises:
            OutputError: it could not be written; the lines before it are kept.
        """
        line = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
        with self._lock:
            if self._is_closed:  # its number may be another file's by now
                raise OutputError(f"{str(self._path)!r} must be open to be written, but is closed")
            try:
                written = 0
                while written < len(line):
                    written += os.pwrite(self._file, line[written:], self._end + written)
                os.fsync(self._file)
            except OSError as error:
                os.ftruncate(self._file, self._end)
                raise OutputError(cannot_write(self._path, error)) from error
            self._end += len(line)

    def __enter__(self) -> "LineFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._is_closed = True
            os.close(self._file)


def _end_of_whole_lines(file: int) -> int:
    """Where the last line that was finished ends, looking backwards."""
    end = os.fstat(file).st_size
    piece = 1 << 16
    while end > 0:
        start = max(0, end - piece)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
