# SPDX-License-Identifier: Apache-2.0
"""A file, a folder or a hub data set as conversations; no code that comes with data is run."""

import logging
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from keylayers.data.formats import (
    TEXT_COLUMNS,
    Converted,
    Format,
    Row,
    conversations,
    recognise,
    require_columns,
)
from keylayers.data.json_shape import check_shape
from keylayers.data.options import DataOptions
from keylayers.errors import DataError, did_you_mean

if TYPE_CHECKING:
    import datasets

# File endings and the reader of `datasets` for each. CSV cells stay text, as "007" and "NA" must.
_READERS: dict[str, tuple[str, dict[str, object]]] = {
    ".json": ("json", {"parse_agent_traces": False}),
    ".jsonl": ("json", {"parse_agent_traces": False}),
    ".csv": (
        "csv",
        {"converters": dict.fromkeys(TEXT_COLUMNS, str), "keep_default_na": False},
    ),
    ".parquet": ("parquet", {}),
}
_HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[\w.-]+))?")
_READ_ROWS = 1000  # rows turned into Python objects at a time


@dataclass(frozen=True)
class Table:
    """Rows as they are in the data."""

    columns: tuple[str, ...]
    rows: Callable[[], Iterator[Row]]
    """Gives them from the first one on, each time it is called."""


@contextmanager
def opened(options: DataOptions) -> Iterator[Table]:
    """The rows of the data, of which there is at least one, for the length of the block."""
    # The user's cache would hide edits of a file from the next run, and keep a copy of the data.
    with tempfile.TemporaryDirectory(prefix="keylayers-data-") as cache, quiet_datasets():
        found = _open(options, cache)
        if next(_rows(found), None) is None:
            raise DataError(_empty(options))
        yield Table(tuple(found.column_names), lambda: _rows(found))


def read_conversations(options: DataOptions) -> tuple[Format, Converted]:
    """Everything usable in the data, in order, and the format it had."""
    with opened(options) as table:
        if options.format is None:
            format = recognise(table.columns, next(table.rows()))
        else:
            format = require_columns(options.format, table.columns)
        converted = conversations(table.rows(), format)
    if not converted.conversations:
        raise DataError(
            f"The data must hold answers to learn, got {converted.num_dropped_empty} rows without "
            f"one in the format {format!r}; check the columns or insist on another `--format`."
        )
    return format, converted


def _rows(found: "datasets.Dataset") -> Iterator[Row]:
    try:
        for batch in found.iter(batch_size=_READ_ROWS):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))
    except UnicodeDecodeError as error:
        raise DataError(f"Data must be UTF-8 text, got: {error}; convert the file.") from error


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Keeps `datasets` from printing: what goes wrong is in the exception."""
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
    """The rows of a file, a folder or a hub data set; no code that comes with data is ever run."""
    import datasets

    path = Path(options.data).expanduser()
    hub = _HUB_NAME.fullmatch(options.data)
    try:
        if path.is_dir() and any(
            (path / name).is_file() for name in ("state.json", "dataset_dict.json")
        ):
            return _open_saved(path, options.data_split)
        if path.exists():
            reader, reader_options = _reader(path)
            if reader == "json":
                check_shape(path)
            files = (
                {"path": reader, "data_files": str(path)} if path.is_file() else {"path": str(path)}
            )
            return datasets.load_dataset(
                split=options.data_split, cache_dir=cache, **files, **reader_options
            )
        if hub is None or _suffix(path) in _READERS:
            raise DataError(_missing(path))
        return datasets.load_dataset(hub["name"], hub["config"], split=options.data_split)
    except DataError:
        raise
    except StopIteration as error:  # how `datasets` answers to an empty JSON file
        raise DataError(_empty(options)) from error
    # What the readers raise for broken, mixed or missing data; Arrow's errors are among these.
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


def _suffix(path: Path) -> str:
    return Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()


def _reader(path: Path) -> tuple[str, dict[str, object]]:
    """The reader for a file, or for the one kind of data files in a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    found = sorted({_suffix(one) for one in files if one.is_file()} & _READERS.keys())
    if len({_READERS[suffix][0] for suffix in found}) != 1:
        raise DataError(
            f"Data files must be of one kind ({', '.join(_READERS)}, maybe with .gz), got "
            f"{' and '.join(found) or 'none of these'} in {str(path)!r}; convert, or give one file."
        )
    return _READERS[found[0]]


def _empty(options: DataOptions) -> str:
    return f"The data must have rows, got none in {options.data!r}; check it, or `--data-split`."


def _missing(path: Path) -> str:
    siblings = [one.name for one in path.parent.iterdir()] if path.parent.is_dir() else []
    return (
        "`data` must be a file, a folder or a hub data set as owner/name, "
        f"got {str(path)!r}, which is none of them{did_you_mean(path.name, siblings)}"
    )


def _unreadable(options: DataOptions, error: BaseException, *, is_hub: bool) -> str:
    """One line with the innermost cause, which is the one that names the place."""
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
        f"{options.data_split!r}), got: {reason}. Mend the file or choose another `--data-split`."
    )
