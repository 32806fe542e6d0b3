# SPDX-License-Identifier: Apache-2.0
"""The tables of the docs, in Markdown, from the records; a test compares them."""

import json
import statistics
from pathlib import Path

RECORDS = Path(__file__).parent / "records"
NAMES = {
    "demo_polite": "demo, polite",
    "demo_list": "demo, list",
    "demo_terse": "demo, terse",
    "english_2m_alpaca": "2 M model, Alpaca-GPT4",
}
LEARNING_RATES = {"sgd": 10.0, "adam": 0.05}
SHORT = [("sgd", 1.0), ("adam", 1.0)]
LONG = [(optimizer, score) for optimizer in LEARNING_RATES for score in (1.0, 2.0, 4.0)]


def areas(record, optimizer, score):
    """The area of one setting in every run of a record."""
    wanted = (optimizer, LEARNING_RATES[optimizer], score)
    return [
        setting["area"]
        for run in record["runs"]
        for setting in run["settings"]
        if (setting["optimizer"], setting["learning_rate"], setting["initial_score"]) == wanted
    ]


def table(settings, cell):
    """One row a data set: random orders, then each setting; `cell` writes a list of areas."""
    titles = ["data", "random orders"]
    titles += [f"{optimizer.upper()}, initial score {score:g}" for optimizer, score in settings]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for key, name in NAMES.items():
        record = json.loads((RECORDS / f"mask_optimizer_{key}.json").read_text())
        at_random = [area for run in record["runs"] for area in run["random"]]
        cells = [cell(at_random), *(cell(areas(record, *setting)) for setting in settings)]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines)


def mean_and_range(values):
    """A cell of the log."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f}-{max(values):.3f})"


def short_table():
    """For the README: means of the default and of Adam."""
    return table(SHORT, lambda values: f"{statistics.mean(values):.2f}")


def long_table():
    """For the log: mean and range of every setting at the middle learning rate."""
    return table(LONG, mean_and_range)


def training_table():
    """For the README: what was trained on real data, and its held-out loss."""
    record = json.loads((RECORDS / "train_english_2m_alpaca.json").read_text())
    lines = [
        "| trained | modules | LoRA parameters | held-out loss, nats a token |",
        "|---|---|---|---|",
    ]
    for row in record["results"]:
        cells = (
            row["label"],
            str(row["num_modules"]),
            f"{row['num_trained_parameters']:,}",
            f"{row['held_out_loss_nats']:.3f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def methods_table():
    """For the log: areas of the methods, mean and range over seeds."""
    lines = []
    for key, name in NAMES.items():
        record = json.loads((RECORDS / f"methods_{key}.json").read_text())
        runs = record["runs"]
        settings = [(one["method"], one["passes"]) for one in runs[0]["settings"]]
        if not lines:
            titles = [f"{method}, {passes} passes" for method, passes in settings]
            lines = ["| " + " | ".join(["data", "random orders", *titles]) + " |"]
            lines.append("|" + "---|" * (len(titles) + 2))
        columns = [[area for run in runs for area in run["random"]]]
        columns += [[run["settings"][i]["area"] for run in runs] for i in range(len(settings))]
        lines.append("| " + " | ".join([name, *map(mean_and_range, columns)]) + " |")
    return "\n".join(lines)


TABLES = (
    short_table,
    long_table,
    methods_table,
    training_table,
)

if __name__ == "__main__":
    for make in TABLES:
        print(make(), end="\n\n")
