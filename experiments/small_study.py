# SPDX-License-Identifier: Apache-2.0
"""The paper's experiments on the built-in model: record, and tables of RESULTS.md.

    keylayers demo --output demo --files-only
    keylayers study recipes/small/*.yaml --output small
    python experiments/small_study.py small       # writes records/small_study.json

Differences are paired by seed; ± is half of Student's 95 % interval over seeds.
"""

import json
import statistics
import sys
from pathlib import Path

import pandas as pd

from tables import RECORDS, interval, load, markdown

MEASURES = {
    "held_out_loss": "loss",
    "held_out_loss_base": "base_loss",
    "modules": "num_modules",
    "trained_parameters": "num_parameters",
}
RECIPES = (
    "freeze",
    "tune",
    "initial-scores",
    "checkpoints",
    "agreement",
    "cross-data",
    "qlora",
    "updates",
)
METHODS = ("ila", "elimination", "random")


def collect(folder):
    """The record of a finished study: what was trained, and how far rankings agree."""
    record = {"environment": None, "recipes": {}}
    for name in RECIPES:
        study = json.loads((folder / name / "study.json").read_text(encoding="utf-8"))
        axes = list(study["grid"])
        table = pd.read_csv(
            folder / name / "results.csv", dtype=dict.fromkeys(axes, str), keep_default_na=False
        )
        cells = table.drop_duplicates("cell")
        agreement = folder / name / "agreement.csv"
        record["environment"] = study["environment"]
        record["recipes"][name] = {
            "options": study["options"],
            "num_cells": len(cells),
            "num_finished": int((cells["status"] == "finished").sum()),
            "trained": trained_rows(table, axes),
            "agreement": agreement_rows(agreement) if agreement.exists() else [],
        }
    text = json.dumps(record, ensure_ascii=False).replace('{"point"', '\n{"point"')
    (RECORDS / "small_study.json").write_text(text + "\n", encoding="utf-8")


def trained_rows(table, axes):
    """One row per training and grid point, with its axes under `point`."""
    wanted = table[(table["kind"] == "training") & table["measure"].isin(list(MEASURES))]
    rows = []
    for (_, *labels), part in wanted.groupby(["cell", *axes], sort=False):
        values = part.set_index("measure")["value"].astype(float)
        found = {short: values[measure] for measure, short in MEASURES.items()}
        found |= {count: int(found[count]) for count in ("num_modules", "num_parameters")}
        rows.append({"point": dict(zip(axes, labels, strict=True)), **found})
    return rows


def agreement_rows(path):
    """One row per pair of rankings and budget; pairs with a flat ranking have no measures."""
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    numbers = ["best", "jaccard", "chance_jaccard", "tau"]
    named = [name for name in table.columns if name not in (*numbers, "top_weighted_tau")]
    return [
        {"point": {name: row[name] for name in named}}
        | {name: float(f"{float(row[name]):.4f}") for name in numbers}
        for row in table.to_dict("records")
        if all(row[name] for name in numbers)
    ]


def trained(recipe, **point):
    """Seed -> loss of the trainings at one point of a recipe's grid."""
    return {
        row["point"]["seed"]: row["loss"]
        for row in load("small_study")["recipes"][recipe]["trained"]
        if all(row["point"].get(axis) == label for axis, label in point.items())
    }


def minus(losses, others):
    """Mean difference by seed with its half interval, or nothing if it was not run."""
    differences = [losses[seed] - others[seed] for seed in losses if seed in others]
    return interval(differences) if differences else ""


def small_training_table():
    """Held-out loss minus that of training all modules, by update, set and choice."""
    rows = []
    cases = [("freeze", "lora", "freeze 25 %", {})]
    cases += [("tune", "lora", budget, {}) for budget in ("0.1", "0.2", "0.3")]
    cases += [("qlora", "lora on 4 bits", budget, {}) for budget in ("0.3", "0.5", "0.75")]
    for update in ("adalora", "full"):
        cases += [("updates", update, one, {"update": update}) for one in ("freeze 25 %", "0.3")]
    for recipe, title, budget, fixed in cases:
        everything = trained(recipe, budget="1.0", **fixed)
        found = [trained(recipe, method=one, budget=budget, **fixed) for one in METHODS]
        is_share = budget.startswith("0")
        what = f"best {100 * float(budget):g} %" if is_share else budget
        rows.append([title, what, *(minus(losses, everything) for losses in found)])
    return markdown(["update", "trained", *METHODS], rows)


def small_agreement_table():
    """Mean Jaccard index and tau-b of pairs of rankings, by what differs."""
    rows = []
    pairs = [
        ("checkpoints", method, "checkpoint", (share, "100 %"))
        for share in ("5 %", "25 %", "50 %")
        for method in ("ila", "elimination")
    ]
    pairs += [("checkpoints", method, "seed", None) for method in ("ila", "elimination")]
    for recipe, method, differs, ends in pairs:
        found = [
            row
            for row in load("small_study")["recipes"][recipe]["agreement"]
            if row["point"]["differs"].replace("_", " ") == differs
            and row["point"].get("method", "ila") == method
            and (ends is None or (row["point"]["first"], row["point"]["second"]) == ends)
            and (ends is not None or row["point"]["checkpoint"] == "100 %")
        ]
        cells = []
        for budget in (0.3, 0.75):
            at_budget = [row for row in found if row["best"] == budget]
            cells.append(f"{statistics.mean(row['jaccard'] for row in at_budget):.2f}")
        tau = statistics.mean(row["tau"] for row in found if row["best"] == 0.3)
        what = differs if ends is None else f"{differs}: {ends[0]}, {ends[1]}"
        rows.append([what, method, *cells, f"{tau:.2f}"])
    chance = [
        f"{next(row['chance_jaccard'] for row in found if row['best'] == budget):.2f}"
        for budget in (0.3, 0.75)
    ]
    rows.append(["chance", "", *chance, "0.00"])
    return markdown(["differ in", "method", "best 30 %", "best 75 %", "tau-b"], rows)


def cross_data_table():
    """The best 30 % by a ranking of one data set, trained on another: loss minus all modules."""
    rows = load("small_study")["recipes"]["cross-data"]["trained"]
    sources = dict.fromkeys(row["point"]["ranked_on"] for row in rows)
    data = [*dict.fromkeys(row["point"]["train_data"] for row in rows)]
    everything = next(source for source in sources if "all modules" in source)
    lines = []
    for source in sources:
        if source != everything:
            ends = (source, everything)
            pairs = (
                [trained("cross-data", ranked_on=where, train_data=name) for where in ends]
                for name in data
            )
            lines.append([source, *(minus(*pair) for pair in pairs)])
    titles = (f"trained on {name.removesuffix('.jsonl')}" for name in data)
    return markdown(["ranked on", *titles], lines)


TABLES = (small_training_table, small_agreement_table, cross_data_table)

if __name__ == "__main__":
    collect(Path(sys.argv[1]))
