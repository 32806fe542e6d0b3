# SPDX-License-Identifier: Apache-2.0
"""Reads a file, a folder or a hub data set; never runs code that comes with data."""

import gzip
import logging
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from keylayers.data.formats import FORMATS, Conversation, read_format
from keylayers.data.options import DataFormat, DataOptions
from keylayers.data.preferences import PREFERENCES, Preference, PreferenceFormat, require_columns
from keylayers.data.turns import DOCUMENT_COLUMNS, SYSTEM_COLUMNS, Row
from keylayers.errors import ConfigError, DataError, did_you_mean
from keylayers.model.options import Objective

if TYPE_CHECKING:
    import datasets

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
_READ_ROWS = 1000  # rows turned into Python objects at a time; singly takes several times as long
_DEEPEST = 500  # levels of JSON; conversations have four
_JSON_PARTS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]|\bnull\b')


def read_conversations(options: DataOptions) -> tuple[DataFormat, list[Conversation], int]:
    """The format of the data, the conversations with an answer, and how many have none."""
    with _opened(options) as (first_row, rows):
        format = read_format(first_row, options.format)
        return format, *convert_rows(rows, format, FORMATS[format][1])


def read_preferences(
    options: DataOptions, objective: Objective
) -> tuple[PreferenceFormat, list[Preference], int]:
    """The format that the objective needs, the whole preferences, and how many lack a part."""
    if options.format is not None:
        raise ConfigError(
            f"`format` must be left out with `objective` {objective}, whose columns decide, got "
            f"{options.format!r}"
        )
    with _opened(options) as (first_row, rows):
        format = require_columns(objective, first_row)
        return format, *convert_rows(rows, format, PREFERENCES[format])


def convert_rows(
    rows: Iterable[Row], format: str, convert: Callable[[Row], Iterable[_Example]]
) -> tuple[list[_Example], int]:
    """The examples with an answer to learn, and how many have none."""
    found: list[_Example] = []
    for number, row in enumerate(rows, start=1):
        try:
            found += convert(row)
        except DataError as error:
            raise DataError(f"Row {number}: {error}") from error
    usable = [example for example in found if example.has_answer]
    if not usable:
        raise DataError(
            f"The data must hold answers to learn, got {len(found)} examples without one in the "
            f"format {format!r}; check the columns, `--format` and `--objective`."
        )
    return usable, len(found) - len(usable)


@contextmanager
def _opened(options: DataOptions) -> Iterator[tuple[Row, Iterator[Row]]]:
    """The first row of the data, which must have one, and all rows, for the length of the block."""
    # The user's cache would hide edits of a file from the next run, and keep a copy of the data.
    with tempfile.TemporaryDirectory(prefix="keylayers-data-") as cache, quiet_datasets():
        data = _load(options, cache)
        try:
            first_row = next(_rows_of(data), None)
            if first_row is None:
                raise DataError(
                    f"The data must have rows, got none in {options.data!r}; check it, or "
                    "`--data-split`."
                )
            yield first_row, _rows_of(data)
        except UnicodeDecodeError as error:  # from reading a row
            raise DataError(f"Data must be UTF-8 text, got: {error}; convert the file.") from error


def _rows_of(data: "datasets.Dataset") -> Iterator[Row]:
    for batch in data.iter(batch_size=_READ_ROWS):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keep `datasets` from printing; its exceptions say what went wrong."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()


def _load(options: DataOptions, cache: str) -> "datasets.Dataset":
    from datasets import Dataset, load_dataset
    from datasets.exceptions import DatasetsError

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
        raise DataError(_unreadable(options, error, is_hub=not path.exists())) from error


def _load_saved(path: Path, split: str) -> "datasets.Dataset":
    """A folder that `save_to_disk` wrote."""
    from datasets import DatasetDict, load_from_disk

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
    for file in files if reader == "json" else ():
        _check_json(file)
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


def _check_json(path: Path) -> None:
    """Refuse JSON that ends the process without a message in pyarrow 26.0.1.

    Its reader overflows the stack on deep nesting, and reads a bad address where the first rows of
    a block are `null`.
    """
    depth = row_depth = 0  # row_depth is 1 in a list of rows
    broken = suppress(OSError, EOFError, zlib.error)  # the reader says what is wrong
    with broken, gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
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


def _unreadable(options: DataOptions, error: BaseException, *, is_hub: bool) -> str:
    while error.__cause__ is not None and not is_hub:  # the innermost names the place in the file
        error = error.__cause__
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if is_hub:
        return (
            f"{options.data!r} must be a file, a folder or a reachable hub data set; there is no "
            f"such file, and the hub said: {reason}. Check the name, log in, or give a local file."
        )
    return (
        f"{options.data!r} must be readable as a table with one type per column (split "
        f"{options.data_split!r}), got: {reason}. Fix the file or choose another `--data-split`."
    )
