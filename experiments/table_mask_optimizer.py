# SPDX-License-Identifier: Apache-2.0
"""The table of `mask_optimizer.py`'s records , in Markdown."""

import json
import statistics
from pathlib import Path

RECORDS = Path(__file__).parent / "records"
SHOWN = [("sgd", 10.0, score) for score in (1.0, 2.0, 4.0)] + [
    ("adam", 0.05, score) for score in (1.0, 2.0, 4.0)
]


def cell(areas):
    """Mean and range over runs."""
    return f"{statistics.mean(areas):.3f} ({min(areas):.3f} to {max(areas):.3f})"


def rows():
    """One row a data set: random orders, then each setting, over all seeds."""
    for path in sorted(RECORDS.glob("mask_optimizer_*.json")):
        record = json.loads(path.read_text())
        name = path.stem.removeprefix("mask_optimizer_").replace("_", " ")
        cells = [cell([area for run in record["runs"] for area in run["random"]])]
        for optimizer, rate, score in SHOWN:
            areas = [
                setting["area"]
                for run in record["runs"]
                for setting in run["settings"]
                if (setting["optimizer"], setting["learning_rate"], setting["initial_score"])
                == (optimizer, rate, score)
            ]
            cells.append(cell(areas))
        yield [name, *cells]


def main():
    """Print the table."""
    titles = ["data", "random orders"] + [
        f"{optimizer}, s0 = {score:g}" for optimizer, _, score in SHOWN
    ]
    print("| " + " | ".join(titles) + " |")
    print("|" + "---|" * len(titles))
    for row in rows():
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
