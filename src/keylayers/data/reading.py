# SPDX-License-Identifier: Apache-2.0
"""Reads a file, a folder or a hub data set; never runs code that comes with data."""

import gzip
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from keylayers.data.formats import (
    FORMATS,
    Conversation,
    conversations_of,
    preference_data,
    read_format,
)
from keylayers.data.options import DataOptions
from keylayers.data.preferences import PREFERENCES, Preference, rated_column, require_columns
from keylayers.data.turns import DOCUMENT_COLUMNS, SYSTEM_COLUMNS, Row, in_row
from keylayers.errors import ConfigError, DataError, did_you_mean
from keylayers.model.options import Objective
from keylayers.progress import quiet

_Example = TypeVar("_Example", Conversation, Preference)

# File endings, and the reader of `datasets` with its options. datasets 5 rewrites JSON that looks
# like a coding agent's trace unless told not to. CSV cells stay text: "007" and "NA" are answers.
_TEXT_COLUMNS = (
    *(name for choices, _ in FORMATS.values() for names in choices for name in names),
    *SYSTEM_COLUMNS,
    *DOCUMENT_COLUMNS,
    "chosen",
    "rejected",
)
_JSON: dict[str, object] = {"parse_agent_traces": False}
_CSV = {"converters": dict.fromkeys(_TEXT_COLUMNS, str), "keep_default_na": False}
_READERS: dict[str, tuple[str, dict[str, object]]] = {
    ".json": ("json", _JSON),
    ".jsonl": ("json", _JSON),
    ".csv": ("csv", _CSV),
    ".parquet": ("parquet", {}),
}
_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[\w.-]+))?")
_NOTHING: tuple[object, ...] = (None, "", [])  # cells of CSV are never null
_READ_ROWS = 1000  # rows turned into Python objects at a time; singly takes several times as long
_DEEPEST = 500  # levels of JSON; conversations have four
_NOT_UTF_8 = re.compile(rb"\xff\xfe|\xfe\xff|.{0,3}\0", re.DOTALL)  # of UTF-16 and UTF-32
_JSON_PARTS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]|\bnull\b')


@dataclass(frozen=True)
class Found(Generic[_Example]):
    """What data hold."""

    format: str
    examples: list[_Example]  # with an answer to learn
    num_dropped_empty: int  # without one
    unused_columns: tuple[str, ...]  # that hold something


class _ReadRow(dict[str, object]):
    """The columns of a row that hold something; it notes which of them are asked for."""

    def __init__(self, row: Row) -> None:
        super().__init__({name: cell for name, cell in row.items() if cell not in _NOTHING})
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> object:
        self.used.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: object = None) -> object:
        self.used.add(name)
        return super().get(name, default)


def read_conversations(options: DataOptions) -> Found[Conversation]:
    """The conversations of the data, in the format that its columns show."""
    with _opened(options) as data:
        is_forced = options.format is not None
        cells = dict.fromkeys(data.column_names) if is_forced else _first_cells(data)
        format = read_format(cells, options.format)
        name = None if is_forced else rated_column(data)
        is_class = format == "text" and not isinstance(cells.get(name or ""), bool)  # of the text
        if name is not None and not is_class:
            raise preference_data(f"{', '.join(data.column_names)}; {name} rates them")
        convert = partial(conversations_of, format=format, is_forced=is_forced)
        return convert_rows(_rows_of(data), format, convert)


def read_preferences(options: DataOptions, objective: Objective) -> Found[Preference]:
    """The whole preferences, in the format that the objective needs."""
    if options.format is not None:
        raise ConfigError(
            f"`format` must be left out with `objective` {objective}, whose columns decide, got "
            f"{options.format!r}"
        )
    with _opened(options) as data:
        cells = dict.fromkeys(data.column_names) | _first_cells(data)
        format = require_columns(objective, cells)
        return convert_rows(_rows_of(data), format, PREFERENCES[format])


def convert_rows(
    rows: Iterable[Row], format: str, convert: Callable[[Row], Iterable[_Example]]
) -> Found[_Example]:
    """The examples of the rows."""
    found: list[_Example] = []
    held: dict[str, None] = {}
    used: set[str] = set()
    for number, row in enumerate(map(_ReadRow, rows), start=1):
        with in_row(number):
            found += [replace(example, row_number=number) for example in convert(row)]
        held |= dict.fromkeys(row)
        used |= row.used
    usable = [example for example in found if example.has_answer]
    if not usable:
        raise DataError(
            f"The data must hold answers to learn, got {len(found)} examples without one in the "
            f"format {format!r}; check the columns, `--format` and `--objective`."
        )
    unused = tuple(name for name in held if name not in used)
    return Found(format, usable, len(found) - len(usable), unused)


@contextmanager
def _opened(options: DataOptions) -> Iterator[Dataset]:
    """The data, which must have a row, for the length of the block."""
    # The user's cache would hide edits of a file from the next run, and keep a copy of the data.
    with tempfile.TemporaryDirectory(prefix="keylayers-data-") as cache, quiet("datasets"):
        try:
            data = _load(options, cache)
            if next(_rows_of(data), None) is None:
                raise DataError(
                    f"The data must have rows, got none in {options.data!r}; check it, or "
                    "`--data-split`."
                )
            yield data
        except UnicodeDecodeError as error:
            raise DataError(f"Data must be UTF-8 text, got: {error}; convert the file.") from error


def _rows_of(data: Dataset) -> Iterator[Row]:
    for batch in data.iter(batch_size=_READ_ROWS):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _first_cells(data: Dataset) -> dict[str, object]:
    """The first cell that holds something of each column that has one, or else all columns."""
    found: dict[str, object] = {}
    for row in _rows_of(data):
        absent = ((name, cell) for name, cell in row.items() if name not in found)
        found |= {name: cell for name, cell in absent if cell not in _NOTHING}
        if len(found) == len(row):
            break
    return {name: found.get(name) for name in data.column_names if name in found or not found}


def _load(options: DataOptions, cache: str) -> Dataset:
    path = Path(options.data).expanduser()
    try:
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return _load_saved(path, options.data_split)
        arguments = _local(path, cache) if path.exists() else _on_hub(options.data)
        return load_dataset(**arguments, split=options.data_split)
    except DataError:
        raise
    except StopIteration:  # how datasets 5 reacts to an empty JSON file
        return Dataset.from_list([])
    # What the readers raise for broken, mixed or missing data, including Arrow's errors.
    except (DatasetsError, OSError, RuntimeError, TypeError, ValueError) as error:
        cause: BaseException = error
        while cause.__cause__ is not None and path.exists():  # names the place in the file
            cause = cause.__cause__
        if isinstance(cause, UnicodeDecodeError):
            raise cause from None
        reason = " ".join(str(cause).split())[:200] or type(cause).__name__
        if not path.exists():
            raise DataError(
                f"{options.data!r} must be a file, a folder or a reachable hub data set; there is "
                f"no such file, and the hub said: {reason}. Check the name, log in, or give a "
                "local file."
            ) from error
        raise DataError(
            f"{options.data!r} must be readable as a table with one type per column (split "
            f"{options.data_split!r}), got: {reason}. Fix the file or choose another "
            "`--data-split`."
        ) from error


def _load_saved(path: Path, split: str) -> Dataset:
    """A folder that `save_to_disk` wrote."""
    saved = load_from_disk(str(path))
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    if split not in splits:  # in the words of `load_dataset`
        raise ValueError(f'Unknown split "{split}". Should be one of {list(splits)}.')
    return splits[split]


def _local(path: Path, cache: str) -> dict[str, object]:
    """Arguments of `load_dataset` for a file, or for a folder of data files of a single type."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    files = sorted(file for file in files if _suffix(file) in _READERS)
    readers = {_suffix(file): _READERS[_suffix(file)] for file in files}
    if len({reader for reader, _ in readers.values()}) != 1:
        raise DataError(
            f"Data files must be of one type ({', '.join(_READERS)}, optionally with .gz), got "
            f"{' and '.join(sorted(readers)) or 'none of these'} in {str(path)!r}; convert, or "
            "give one file."
        )
    reader, more = readers.popitem()[1]
    for file in files if reader in ("json", "csv") else ():
        _check_text(file, is_json=reader == "json")
    found = {"path": reader, "data_files": str(path)} if path.is_file() else {"path": str(path)}
    return {**found, "cache_dir": cache, **more}


def _on_hub(data: str) -> dict[str, object]:
    """Arguments of `load_dataset` for a name on the hub."""
    path, hub = Path(data), _HUB_NAME.fullmatch(data)
    if hub is None or _suffix(path) in _READERS:
        folder = path.expanduser().parent
        siblings = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        raise DataError(
            "`data` must be a file, a folder or a hub data set as owner/name, "
            f"got {data!r}, which is none of them{did_you_mean(path.name, siblings)}"
        )
    return {"path": hub["name"], "name": hub["config"]}


def _check_text(path: Path, *, is_json: bool) -> None:
    """Refuse UTF-16, and JSON on which pyarrow 26.0.1 ends the process: deep or with null rows."""
    depth = row_depth = 0  # row_depth is 1 in a list of rows
    broken = suppress(OSError, EOFError, zlib.error)  # the reader says what is wrong
    with broken, gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        if _NOT_UTF_8.match(file.peek(4)):
            raise DataError(
                f"Data must be UTF-8 text, got UTF-16 or UTF-32 in {str(path)!r}; convert the file "
                "(in PowerShell: `Set-Content -Encoding utf8`)."
            )
        for number, line in enumerate(file if is_json else (), start=1):
            is_object = line.startswith(b"{") and line.rstrip().endswith(b"}")
            if depth == 0 and is_object and line.count(b"{") + line.count(b"[") <= _DEEPEST:
                continue  # a plain row, as nearly all lines are
            for part in _JSON_PARTS.findall(line):
                row_depth = int(part == b"[") if depth == 0 and part in b"[{" else row_depth
                depth = max(0, depth + (part in b"[{") - (part in b"]}"))
                if depth > _DEEPEST or (part == b"null" and depth <= row_depth):
                    raise DataError(
                        f"JSON data must be objects, nested at most {_DEEPEST} levels deep, but "
                        f"line {number} of {str(path)!r} is null or nested deeper; fix it"
                    )


def _suffix(path: Path) -> str:
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()
