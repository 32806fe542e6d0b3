# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/results.md, from the record of the small study.

    keylayers demo --output demo --files-only
    keylayers study recipes/small/*.yaml --output small
    python experiments/results.py --collect small       # writes the record
    python experiments/results.py                       # writes the tables into the page

Differences are paired by seed; what follows a ± is half of Student's 95 % interval over the seeds.
A test compares the page with what this makes.
"""

import argparse
import json
import re
import statistics
from pathlib import Path

import pandas as pd
from scipy.stats import t

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "results.md"
RECORD = ROOT / "experiments" / "records" / "small_study.json"
ALL = "1.0"  # the budget that trains every module
FREEZE = "freeze 25 %"
TITLES = {
    "ila": "ILA as published",
    "elimination": "elimination (keylayers' default)",
    "random": "random",
    "first": "first of the network",
    "last": "last of the network",
    "update-norm": "update norm",
}
TRAINED = {
    "held_out_loss": "loss",
    "held_out_loss_base": "base_loss",
    "modules": "num_modules",
    "trained_parameters": "num_parameters",
}
RECIPES = (
    *("freeze", "tune", "initial-scores", "checkpoints", "agreement"),
    *("cross-data", "qlora", "updates"),
)


def collect(folder):
    """One record of a study's results: what was trained, and how far rankings agree."""
    record = {"environment": None, "recipes": {}}
    for name in RECIPES:
        home = folder / name
        study = json.loads((home / "study.json").read_text(encoding="utf-8"))
        axes = list(study["grid"])
        labels = dict.fromkeys(axes, str)
        table = pd.read_csv(home / "results.csv", dtype=labels, keep_default_na=False)
        cells = table.drop_duplicates("cell")
        record["environment"] = study["environment"]
        record["recipes"][name] = {
            "options": study["options"],
            "num_cells": len(cells),
            "num_finished": int((cells["status"] == "finished").sum()),
            "trained": trained_rows(table, axes),
            "agreement": agreement_rows(home / "agreement.csv"),
        }
    text = json.dumps(record, ensure_ascii=False)
    RECORD.write_text(text.replace('{"point"', '\n{"point"') + "\n", encoding="utf-8")


def trained_rows(table, axes):
    """A row for each training of each combination, with its axes under `point`."""
    wanted = table[(table["kind"] == "training") & table["measure"].isin(list(TRAINED))]
    rows = []
    for _, part in wanted.groupby(["cell", *axes], sort=False):
        values = dict(zip(part["measure"], part["value"].astype(float), strict=True))
        found = {short: values[measure] for measure, short in TRAINED.items()}
        for count in ("num_modules", "num_parameters"):
            found[count] = int(found[count])
        rows.append({"point": part.iloc[0][axes].to_dict(), **found})
    return rows


def agreement_rows(path):
    """A row for each pair of rankings and budget, with what it is under `point`.

    Pairs of which one ranks nothing have no measures, and are left out.
    """
    if not path.exists():
        return []
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    numbers = ["best", "jaccard", "chance_jaccard", "tau"]
    named = [name for name in table.columns if name not in (*numbers, "top_weighted_tau")]
    return [
        {"point": {name: row[name] for name in named}}
        | {name: float(f"{float(row[name]):.4f}") for name in numbers}
        for row in table.to_dict("records")
        if all(row[name] for name in numbers)
    ]


def load():
    """The record."""
    return json.loads(RECORD.read_text(encoding="utf-8"))["recipes"]


def trained(recipe, **point):
    """Seed -> the row of a training; what the recipe holds none of is left out."""
    return {
        row["point"]["seed"]: row
        for row in load()[recipe]["trained"]
        if all(row["point"][axis] == label for axis, label in point.items())
    }


def against(rows, others):
    """The loss minus that of others with the same seed."""
    return [rows[seed]["loss"] - others[seed]["loss"] for seed in rows if seed in others]


def plus_minus(values, digits=3, sign="+"):
    """A mean with half its 95 % interval."""
    if not values:
        return ""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:{sign}.{digits}f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    half = float(t.ppf(0.975, len(values) - 1)) * error
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}"


def markdown(titles, rows):
    """A Markdown table; a line instead if there is nothing for it yet."""
    if not rows:
        return "Not finished yet."
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def losses(rows):
    """The losses themselves."""
    return plus_minus([row["loss"] for row in rows.values()], sign="")


def thousands(rows):
    """Trained parameters."""
    return f"{statistics.mean(row['num_parameters'] for row in rows.values()) / 1000:.0f} k"


def trained_lines(recipe, choices, budgets, **fixed):
    """For each budget and method: loss, that minus all, that minus random, parameters."""
    everything = trained(recipe, budget=ALL, **fixed)
    lines = []
    for budget in budgets:
        at_random = trained(recipe, method="random", budget=budget, **fixed)
        for method in choices:
            rows = trained(recipe, method=method, budget=budget, **fixed)
            if rows:
                to_random = "" if method == "random" else plus_minus(against(rows, at_random))
                lines.append(
                    [
                        label_of(budget),
                        TITLES[method],
                        losses(rows),
                        plus_minus(against(rows, everything)),
                        to_random,
                        thousands(rows),
                        str(len(rows)),
                    ]
                )
    if everything:
        lines.append(
            ["all", "", losses(everything), "", "", thousands(everything), str(len(everything))]
        )
    return lines


def label_of(budget):
    """A budget as tables show it."""
    return budget if budget == FREEZE else f"best {100 * float(budget):g} %"


COLUMNS = ("trained", "chosen by", "held-out loss", "minus all", "minus random", "LoRA", "seeds")


def freeze_table():
    """Freezing a quarter."""
    methods = ("ila", "elimination", "first", "last", "random")
    return markdown(COLUMNS, trained_lines("freeze", methods, [FREEZE]))


def tune_table():
    """Training only the best."""
    methods = ("ila", "elimination", "first", "last", "random")
    return markdown(COLUMNS, trained_lines("tune", methods, ["0.1", "0.2", "0.3"]))


def qlora_table():
    """The same with a base in 4 bits."""
    return markdown(COLUMNS, trained_lines("qlora", ("ila", "random"), ["0.3", "0.5", "0.75"]))


def updates_table():
    """The same for other kinds of updates."""
    lines = []
    for update in ("lora", "adalora", "full"):
        found = trained_lines("updates", ("ila", "random"), ["0.3", FREEZE], update=update)
        lines += [[update, *line] for line in found]
    columns = [("parameters" if one == "LoRA" else one) for one in COLUMNS]
    return markdown(["update", *columns], lines)


def cross_table():
    """Each ranking on each data set: the loss minus that of all modules."""
    rows = load()["cross-data"]["trained"]
    ranked_on = [*dict.fromkeys(row["point"]["ranked_on"] for row in rows)]
    data = [*dict.fromkeys(row["point"]["train_data"] for row in rows)]
    everything = next((one for one in ranked_on if "all modules" in one), None)
    lines = []
    for one in ranked_on:
        cells = []
        for other in data:
            found = trained("cross-data", ranked_on=one, train_data=other)
            whole = trained("cross-data", ranked_on=everything, train_data=other)
            cells.append(losses(found) if one == everything else plus_minus(against(found, whole)))
        lines.append([f"{one}: the loss itself" if one == everything else one, *cells])
    return markdown(
        ["ranked on", *(f"trained on {one.removesuffix('.jsonl')}" for one in data)], lines
    )


def agreement_lines(recipe, *shown, **of_seeds_at):
    """Means over pairs: what differs, the axes in `shown`, and agreement at both budgets.

    Pairs that differ in their seed come last, and only those at `of_seeds_at`.
    """
    groups = {}
    for row in load()[recipe]["agreement"]:
        point = row["point"]
        of_seeds = point["differs"] == "seed"
        if of_seeds and any(point[axis] != label for axis, label in of_seeds_at.items()):
            continue
        pair = "seeds" if of_seeds else f"{point['differs']}: {point['first']}, {point['second']}"
        labels = [TITLES.get(point[axis], point[axis]) or "" for axis in shown]
        groups.setdefault((*labels, pair.replace("_", " ").replace(".jsonl", "")), []).append(row)
    pairs = [*dict.fromkeys(labels[-1] for labels in groups)]
    pairs.sort(key=lambda pair: pair == "seeds")
    lines = []
    for labels, rows in sorted(groups.items(), key=lambda item: pairs.index(item[0][-1])):
        line = [*labels]
        for budget in (0.3, 0.75):
            found = [row for row in rows if row["best"] == budget]
            values = [row["jaccard"] for row in found]
            line.append(f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})")
            line.append(f"{statistics.mean(row['chance_jaccard'] for row in found):.2f}")
        taus = [row["tau"] for row in rows if row["best"] == 0.3]
        lines.append([*line, f"{statistics.mean(taus):.2f}", str(len(taus))])
    return lines


AGREEMENT = ("differ in", "best 30 %", "chance", "best 75 %", "chance", "tau-b", "pairs")


def initial_table():
    """Initial scores of the published method."""
    return markdown(AGREEMENT, agreement_lines("initial-scores"))


def checkpoints_table():
    """Shares of stage 1."""
    lines = agreement_lines("checkpoints", "method", checkpoint="100 %")
    wanted = [line for line in lines if "100 %" in line[1] or line[1] == "seeds"]
    return markdown(["method", *AGREEMENT], wanted)


def data_table():
    """Data sets, and seeds as the ceiling."""
    lines = [line for line in agreement_lines("agreement", "method") if "method:" not in line[1]]
    return markdown(["method", *AGREEMENT], lines)


def finished_line():
    """How much of the study there is."""
    recipes = load()
    parts = [
        f"{name} {one['num_finished']} of {one['num_cells']}"
        for name, one in recipes.items()
        if one["num_finished"] < one["num_cells"]
    ]
    if not parts:
        return "All cells of all recipes are finished."
    return f"Not all cells are finished yet: {', '.join(parts)}. What is not there is left out."


TABLES = (
    finished_line,
    freeze_table,
    tune_table,
    initial_table,
    checkpoints_table,
    data_table,
    cross_table,
    qlora_table,
    updates_table,
)


def page():
    """The page with every table made anew, between its marks."""
    text = PAGE.read_text(encoding="utf-8")
    for make in TABLES:
        name = make.__name__
        mark = re.compile(rf"(<!-- {name} -->\n).*?(\n<!-- /{name} -->)", re.DOTALL)
        text = mark.sub(lambda match, make=make: match[1] + make() + match[2], text)
    return text


def main():
    """Collect a study, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--collect", type=Path)
    arguments = parser.parse_args()
    if arguments.collect:
        collect(arguments.collect)
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
