# SPDX-License-Identifier: Apache-2.0
"""What was measured, document by document, in one Parquet file: for intervals and for later runs.

A pair is one model on one task. Its key is a hash of everything that decides its result; a pair
whose key is in the file is not measured again. Needs no torch.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
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
    """One model on one task."""

    task: str
    rows: pd.DataFrame  # one per document and metric, with all `COLUMNS` but the first two
    totals: Mapping[str, float]  # metric -> value over all documents, also if it is no mean
    higher_is_better: Mapping[str, bool | None]  # metric -> whether it is, if known
    facts: Mapping[str, Any] = field(default_factory=dict)  # e.g. how many prompts were cut

    def about(self) -> dict[str, Any]:
        """All but the rows, as JSON."""
        return {name: value for name, value in vars(self).items() if name != "rows"}


class Store:
    """The pairs of a folder: all in one file, and those of an unfinished run in a file each."""

    def __init__(self, folder: Path, unfinished: Path) -> None:
        self.file, self.unfinished = folder / DOCUMENTS, unfinished
        self.pairs: dict[str, Measured] = {}
        self._names: dict[str, list[str]] = {}  # of a pair's model, and of models equal to it
        for path in filter(Path.is_file, (self.file, *sorted(unfinished.glob("*.parquet")))):
            self._read(path)

    def put(self, key: str, found: Measured) -> None:
        """Write a pair to disk."""
        self.pairs[key] = found
        _write(self.unfinished / f"{key[:32]}.parquet", {key: found}, {})

    def finish(self, table: Iterable[tuple[str, str]]) -> None:
        """Write all pairs into one file; `table` has keys and models of the latest table."""
        names: dict[str, list[str]] = {}
        for key, model in table:
            names.setdefault(key, []).append(model)
        order = dict.fromkeys((*names, *self.pairs))  # independent of what was measured when
        _write(self.file, {key: self.pairs[key] for key in order}, self._names | names)

    def _read(self, path: Path) -> None:
        try:
            table = pq.read_table(path)
            about = json.loads(table.schema.metadata[_META])
            rows = table.to_pandas().astype(COLUMNS)
        except (pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())[:120]
            raise OutputError(
                f"{str(path)!r} must be a file that `keylayers eval` wrote, but cannot be read: "
                f"{reason}; move it away, or choose another `--output`"
            ) from error
        of_pair = {str(key): part for key, part in rows.groupby("pair", sort=False)}
        for key, found in about.items():
            own = of_pair.get(key, rows.iloc[:0])
            self._names[key] = names = list(own["model"].unique())
            own = own[own["model"].isin(names[:1])].drop(columns=["pair", "model"])
            self.pairs[key] = Measured(rows=own.reset_index(drop=True), **found)


def _write(path: Path, pairs: Mapping[str, Measured], names: Mapping[str, Sequence[str]]) -> None:
    parts = [
        found.rows.assign(pair=key, model=name)
        for key, found in pairs.items()
        for name in names.get(key, [""])
    ]
    rows = pd.concat(parts, ignore_index=True)[[*COLUMNS]].astype(COLUMNS)
    about = {key: found.about() for key, found in pairs.items()}
    table = pa.Table.from_pandas(rows, preserve_index=False)
    table = table.replace_schema_metadata({_META: json.dumps(about).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(path, sink.getvalue().to_pybytes())
