# SPDX-License-Identifier: Apache-2.0
"""JSON that would crash Arrow's reader (pyarrow 26) is refused before it is read.

It overflows its stack on values that are nested without end, and reads a bad address where the
first rows are `null`. Both end the process without a word.
"""

import gzip
import io
import re
import zlib
from pathlib import Path

import numpy as np

from keylayers.errors import DataError

DEEPEST = 500  # levels; conversations have four
_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"')  # no text of JSON goes on in the next line
_STEP = np.zeros(256, dtype=np.int64)
_STEP[list(b"[{")] = 1
_STEP[list(b"]}")] = -1
_IS_VALUE = np.ones(256, dtype=bool)
_IS_VALUE[list(b'[]{},:" \t\r\n\xef\xbb\xbf')] = False  # the last three mark UTF-8


def check_shape(path: Path) -> None:
    """Refuse a JSON file, or a folder with one, on which Arrow would crash.

    Raises:
        DataError: names the file and the line.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.json*"))
    for file in files:
        if file.is_file() and (found := _wrong_line(file)):
            number, reason = found
            raise DataError(
                f"JSON data must be objects, nested at most {DEEPEST} levels deep, but line "
                f"{number} of {str(file)!r} {reason}; mend it"
            )


def _wrong_line(path: Path) -> tuple[int, str] | None:
    """The first line that would not do, and why."""
    level = 0
    row_level: int | None = None  # 0 where each line is a row, 1 in a list of rows
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                if level == 0 and _is_plain_row(line):
                    row_level = row_level or 0
                    continue
                rest = np.frombuffer(_TEXT.sub(b'"', line), dtype=np.uint8)
                if not len(rest):
                    continue
                levels = level + _STEP[rest].cumsum()
                if levels.max() > DEEPEST:
                    return number, "is nested deeper"
                if row_level is None and (levels > 0).any():
                    row_level = int(rest[(levels > 0).argmax()] == ord("["))
                if (_IS_VALUE[rest] & (levels <= (row_level or 0))).any():
                    return number, "holds a row that is null or a number"
                level = max(0, int(levels[-1]))
    except (OSError, EOFError, zlib.error):
        return None  # whoever reads it next says what is wrong
    return None


def _is_plain_row(line: bytes) -> bool:
    """Whether a line is one object that cannot be nested too deep, as nearly all are."""
    text = line.strip()
    is_object = text.startswith(b"{") and text.endswith(b"}")
    return is_object and text.count(b"{") + text.count(b"[") <= DEEPEST


def _opened(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")
