# SPDX-License-Identifier: Apache-2.0
"""Records and Markdown tables, shared by the files that make a page's tables."""

import json
import re
import statistics
from pathlib import Path

from scipy.stats import t

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "experiments" / "records"


def load(name, folder=RECORDS):
    """A record."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def markdown(titles, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def interval(values):
    """Mean ± half the width of its 95 % interval by Student's t; of a single value, itself."""
    count, mean = len(values), f"{statistics.mean(values):+.3f}"
    if count == 1:
        return mean
    return f"{mean}±{t.ppf(0.975, count - 1) * statistics.stdev(values) / count**0.5:.3f}"


def filled(text, tables):
    """The text of a page with every table between its marks made from the records."""
    for make in tables:
        name = make.__name__
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = mark.sub(lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", text)
    return text
