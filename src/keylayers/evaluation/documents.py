# SPDX-License-Identifier: Apache-2.0
"""What was measured, document by document, in one Parquet file: for intervals and for later runs.

A pair is one model on one task. Its key is a hash of everything that decides its result; a pair
whose key is in the file is not measured again. Needs no torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from keylayers.errors import OutputError
from keylayers.files import write_bytes

DOCUMENTS = "documents.parquet"
COLUMNS = {
    "pair": "string",  # key
    "model": "string",  # its name in the latest table; equal models have rows each
    "task": "string",
    "metric": "string",
    "document": "int64",  # its index in the task
    "document_sha256": "string",  # hash of its content
    "value": "float64",
    "size": "float64",  # what the sum of values is divided by: 1, or tokens
    "chance": "float64",  # what guessing gives, if known
}
_META = b"keylayers"


@dataclass(frozen=True)
class Measured:
    """One model on one task.

    Attributes:
        task: Name of the task.
        rows: One row per document and metric, with all `COLUMNS` except the first two.
        totals: Metric -> value over all documents, also if it is not a mean.
        higher_is_better: Metric -> whether more is better, if known.
        facts: Other facts, e.g. how many prompts were cut.
    """

    task: str
    rows: pd.DataFrame
    totals: Mapping[str, float]
    higher_is_better: Mapping[str, bool | None]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def about(self) -> dict[str, Any]:
        """All but the rows, as JSON."""
        return {name: value for name, value in vars(self).items() if name != "rows"}


class Store:
    """The pairs of a folder: all in one file, and those of an unfinished run in a file each."""

    def __init__(self, folder: Path, unfinished: Path) -> None:
        self.file = folder / DOCUMENTS
        self.unfinished = unfinished
        self._known: dict[str, Measured] = {}
        self._names: dict[str, list[str]] = {}
        for path in (self.file, *sorted(unfinished.glob("*.parquet"))):
            if path.is_file():
                pairs, names = _read(path)
                self._known |= pairs
                self._names |= names

    def get(self, key: str) -> Measured | None:
        """The pair with this key, if it was measured."""
        return self._known.get(key)

    def put(self, key: str, found: Measured) -> None:
        """Write a pair to disk."""
        self._known[key] = found
        _write(self.unfinished / f"{key[:32]}.parquet", {key: found}, {})

    def finish(self, names: Mapping[str, Sequence[str]]) -> None:
        """Write all pairs into one file.

        Args:
            names: Key -> names of the model in the table, and of models equal to it.
        """
        order = dict.fromkeys((*names, *self._known))  # independent of what was measured when
        pairs = {key: self._known[key] for key in order}
        _write(self.file, pairs, {**self._names, **names})


def _write(path: Path, pairs: Mapping[str, Measured], names: Mapping[str, Sequence[str]]) -> None:
    parts = [
        found.rows.assign(pair=key, model=name)
        for key, found in pairs.items()
        for name in names.get(key, [""])
    ]
    whole = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=[*COLUMNS])
    table = pa.Table.from_pandas(whole[[*COLUMNS]].astype(COLUMNS), preserve_index=False)
    about = {key: found.about() for key, found in pairs.items()}
    table = table.replace_schema_metadata({_META: json.dumps(about).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(path, sink.getvalue().to_pybytes())


def _read(path: Path) -> tuple[dict[str, Measured], dict[str, list[str]]]:
    """The pairs, and the names of their models."""
    try:
        table = pq.read_table(path)
        about = json.loads(table.schema.metadata[_META])
        whole = table.to_pandas().astype(COLUMNS)
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:120]
        raise OutputError(
            f"{str(path)!r} must be a file that `keylayers eval` wrote, but cannot be read: "
            f"{reason}; move it away, or choose another `--output`"
        ) from error
    rows = {str(key): part for key, part in whole.groupby("pair", sort=False)}
    empty = whole.iloc[:0]
    names = {key: list(map(str, part["model"].unique())) for key, part in rows.items()}
    rows = {key: part[part["model"] == names[key][0]] for key, part in rows.items()}
    pairs = {}
    for key, found in about.items():
        own = rows.get(key, empty).drop(columns=["pair", "model"]).reset_index(drop=True)
        pairs[key] = Measured(rows=own, **found)
    return pairs, names
