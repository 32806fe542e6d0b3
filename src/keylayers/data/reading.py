# SPDX-License-Identifier: Apache-2.0
"""Reads a file, a folder or a hub data set; never runs code that comes with data."""

import gzip
import logging
import re
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from keylayers.data.formats import (
    TEXT_COLUMNS,
    Conversation,
    Row,
    conversations,
    recognise,
    require_columns,
)
from keylayers.data.options import DataFormat, DataOptions
from keylayers.data.preferences import (
    FORMAT_OF,
    Preference,
    PreferenceFormat,
    preferences,
    require_preferences,
)
from keylayers.errors import ConfigError, DataError, did_you_mean
from keylayers.model.options import Objective

if TYPE_CHECKING:
    import datasets

# File endings, and the reader of `datasets` with its options. datasets 5 rewrites JSON that looks
# like a coding agent's trace unless told not to. CSV cells stay text: "007" and "NA" are answers.
_JSON: dict[str, object] = {"parse_agent_traces": False}
_CSV = {"converters": dict.fromkeys(TEXT_COLUMNS, str), "keep_default_na": False}
_READERS: dict[str, tuple[str, dict[str, object]]] = {
    ".json": ("json", _JSON),
    ".jsonl": ("json", _JSON),
    ".csv": ("csv", _CSV),
    ".parquet": ("parquet", {}),
}
_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[\w.-]+))?")
_READ_ROWS = 1000  # rows turned into Python objects at a time
_DEEPEST = 500  # levels of JSON; conversations have four
_JSON_PARTS = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[\]{}]|\bnull\b')


@contextmanager
def opened(options: DataOptions) -> Iterator["datasets.Dataset"]:
    """The data, with at least one row, for the length of the block.

    Raises:
        DataError: the data cannot be found or read, or has no rows.
    """
    # The user's cache would hide edits of a file from the next run, and keep a copy of the data.
    with tempfile.TemporaryDirectory(prefix="keylayers-data-") as cache, quiet_datasets():
        found = _open(options, cache)
        try:
            if next(rows_of(found), None) is None:
                raise DataError(_empty(options))
            yield found
        except UnicodeDecodeError as error:  # from reading a row
            raise DataError(f"Data must be UTF-8 text, got: {error}; convert the file.") from error


def rows_of(found: "datasets.Dataset") -> Iterator[Row]:
    """Every row, in batches: reading rows singly takes several times as long."""
    for batch in found.iter(batch_size=_READ_ROWS):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def read_conversations(options: DataOptions) -> tuple[DataFormat, list[Conversation], int]:
    """The format of the data, the usable conversations in order, and the number of empty ones.

    Raises:
        DataError: the data cannot be read or recognised, or holds no answer.
    """
    with opened(options) as data:
        if options.format is None:
            format = recognise(data.column_names, next(rows_of(data)))
        else:
            format = require_columns(options.format, data.column_names)
        found, num_dropped_empty = conversations(rows_of(data), format)
    if not found:
        raise DataError(
            f"The data must hold answers to learn, got {num_dropped_empty} rows without one in the "
            f"format {format!r}; check the columns or force another `--format`."
        )
    return format, found, num_dropped_empty


def read_preferences(
    options: DataOptions, objective: Objective
) -> tuple[PreferenceFormat, list[Preference], int]:
    """The format that the objective needs, the usable preferences, and the number of empty ones.

    Raises:
        ConfigError: a format is given, which has no effect.
        DataError: the data cannot be read, does not fit the objective, or holds no answer.
    """
    if options.format is not None:
        raise ConfigError(
            f"`format` must be left out with `objective` {objective}, whose columns decide, got "
            f"{options.format!r}"
        )
    format = FORMAT_OF[objective]
    with opened(options) as data:
        require_preferences(format, objective, data.column_names)
        found, num_dropped_empty = preferences(rows_of(data), format)
    if not found:
        raise DataError(
            f"The data must hold prompts with answers, got {num_dropped_empty} rows without; check "
            "the columns."
        )
    return format, found, num_dropped_empty


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


def _open(options: DataOptions, cache: str) -> "datasets.Dataset":
    import datasets

    path = Path(options.data).expanduser()
    hub = _HUB_NAME.fullmatch(options.data)
    try:
        if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return _open_saved(path, options.data_split)
        if path.exists():
            reader, more = _reader(path)
            files = {"data_files": str(path)} if path.is_file() else {}
            if reader == "json":
                for file in [path] if path.is_file() else sorted(path.rglob("*.json*")):
                    _check_json(file)
            return datasets.load_dataset(
                path=reader if path.is_file() else str(path),
                split=options.data_split,
                cache_dir=cache,
                **files,
                **more,
            )
        if hub is None or _suffix(path) in _READERS:
            raise DataError(_missing(path))
        return datasets.load_dataset(hub["name"], hub["config"], split=options.data_split)
    except DataError:
        raise
    except StopIteration as error:  # how datasets 5 reacts to an empty JSON file
        raise DataError(_empty(options)) from error
    # What the readers raise for broken, mixed or missing data, including Arrow's errors.
    except (
        datasets.exceptions.DatasetsError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise DataError(_unreadable(options, error, is_hub=not path.exists())) from error


def _open_saved(path: Path, split: str) -> "datasets.Dataset":
    """A folder that `save_to_disk` wrote."""
    from datasets import DatasetDict, load_from_disk

    saved = load_from_disk(str(path))
    splits = list(saved) if isinstance(saved, DatasetDict) else ["train"]
    if split not in splits:
        raise DataError(
            f"`data_split` must be one of {', '.join(splits)} in {str(path)!r}, got {split!r}"
            f"{did_you_mean(split, splits)}"
        )
    return saved[split] if isinstance(saved, DatasetDict) else saved


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


def _reader(path: Path) -> tuple[str, dict[str, object]]:
    """The reader for a file, or for the single type of data files in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    found = sorted({_suffix(file) for file in files if file.is_file()} & _READERS.keys())
    if len({_READERS[suffix][0] for suffix in found}) != 1:
        raise DataError(
            f"Data files must be of one type ({', '.join(_READERS)}, optionally with .gz), got "
            f"{' and '.join(found) or 'none of these'} in {str(path)!r}; convert, or give one file."
        )
    return _READERS[found[0]]


def _empty(options: DataOptions) -> str:
    return f"The data must have rows, got none in {options.data!r}; check it, or `--data-split`."


def _missing(path: Path) -> str:
    siblings = [sibling.name for sibling in path.parent.iterdir()] if path.parent.is_dir() else []
    return (
        "`data` must be a file, a folder or a hub data set as owner/name, "
        f"got {str(path)!r}, which is none of them{did_you_mean(path.name, siblings)}"
    )


def _unreadable(options: DataOptions, error: BaseException, *, is_hub: bool) -> str:
    """One line with the innermost cause, which names the place in the file."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    reason = " ".join((str(error) if is_hub else str(cause)).split())[:200] or type(cause).__name__
    if is_hub:
        return (
            f"{options.data!r} must be a file, a folder or a reachable hub data set; there is no "
            f"such file, and the hub said: {reason}. Check the name, log in, or give a local file."
        )
    return (
        f"{options.data!r} must be readable as a table with one type per column (split "
        f"{options.data_split!r}), got: {reason}. Fix the file or choose another `--data-split`."
    )
