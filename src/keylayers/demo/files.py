# SPDX-License-Identifier: Apache-2.0
"""The demo's files: the built-in model, and data in three styles of answers."""

import json
from pathlib import Path

from keylayers.demo.world import STYLES, Style, alignment_examples
from keylayers.errors import OutputError
from keylayers.files import output_folder, write_bytes

BASE = Path(__file__).parent / "base"
NUM_EXAMPLES = 504
MODEL = "model"


def write_data(path: Path, style: Style) -> None:
    """Write the questions and answers of one style, one JSON object a line."""
    rows = alignment_examples(style, NUM_EXAMPLES)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_files(folder: Path) -> list[str]:
    """Write the built-in model and the data of all styles; returns the names of the files."""
    files = {path.name: path.read_bytes() for path in sorted(BASE.iterdir())}
    with output_folder(folder), output_folder(folder / MODEL):
        if {path.name for path in (folder / MODEL).iterdir()} - files.keys():
            raise OutputError(
                f"`output` must have room for the built-in model, but {str(folder / MODEL)!r} "
                f"holds other files; choose another folder"
            )
        for name, content in files.items():
            write_bytes(folder / MODEL / name, content)
        for style in STYLES:
            write_data(folder / f"{style}.jsonl", style)
    return [MODEL, *(f"{style}.jsonl" for style in STYLES)]
