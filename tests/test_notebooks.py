# SPDX-License-Identifier: Apache-2.0
"""The notebooks of examples/ run as they are, and what they show is what they hold."""

import json
import re
from pathlib import Path

import nbformat
import pytest

from notebooks import executed

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
TIME = re.compile(r"\d+ s\b")
KIB_AT_MOST = 120  # of a notebook with its pictures


def shown(notebook):
    """What each cell shows, by its number: the kind of each output, and its text."""
    return {
        number: [
            ("\n".join(sorted(output.get("data", {output.get("name"): ""}))), text_of(output))
            for output in cell.outputs
        ]
        for number, cell in enumerate(notebook.cells)
        if cell.cell_type == "code"
    }


def text_of(output):
    text = output.get("text") or output["data"].get("text/plain", "")
    return TIME.sub("some s", text)


def without_numbers(cells):
    return {
        number: [(kind, " ".join(NUMBER.sub("#", text).split())) for kind, text in outputs]
        for number, outputs in cells.items()
    }


def numbers(cells):
    texts = (text for outputs in cells.values() for _, text in outputs)
    return [number.replace(",", "") for text in texts for number in NUMBER.findall(text)]


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_and_shows_what_it_holds(file, tmp_path):
    """Words and whole numbers are the same, decimals up to one in their last digit.

    Processors add in different orders, so that the last digit may differ.
    """
    held, found = shown(nbformat.read(file, as_version=4)), shown(executed(file, tmp_path))
    assert without_numbers(found) == without_numbers(held)
    assert len(numbers(held)) > 20
    for new, old in zip(numbers(found), numbers(held), strict=True):
        digits = len(old.partition(".")[2])
        step = 10.0**-digits if digits else 0
        assert float(new) == pytest.approx(float(old), abs=1.01 * step, rel=0), (new, old)


def test_notebooks_are_small_and_hold_pictures_but_no_times_and_no_errors():
    assert [file.stem for file in NOTEBOOKS] == ["compress_an_adapter", "rank_and_read"]
    for file in NOTEBOOKS:
        assert file.stat().st_size < KIB_AT_MOST * 1024
        notebook = nbformat.read(file, as_version=4)
        nbformat.validate(notebook)
        outputs = [one for own in shown(notebook).values() for one in own]
        assert sum("image/svg+xml" in kinds for kinds, _ in outputs) == 2, file
        content = json.dumps(notebook)
        for word in ("Traceback", "execution_timing", "/tmp", "/home"):
            assert word not in content, (file, word)
