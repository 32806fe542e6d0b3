# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/claims.md and docs/methods.md, in Markdown, from the records of the studies.

python experiments/findings.py       # prints them all; a test compares them with the docs
"""

import json
import statistics
from itertools import combinations
from pathlib import Path

from scipy.stats import kendalltau, t

from keylayers.ranking.compare import chance_jaccard

RECORDS = Path(__file__).parent / "records"
DATA = {
    "polite": "demo, polite",
    "list": "demo, list",
    "terse": "demo, terse",
    "alpaca": "2 M, Alpaca-GPT4",
    "dpo": "2 M, chosen answers",
    "user": "2 M, user-oriented",
}
OVERFIT = "user-long"
TITLES = {
    "elimination": "**elimination** (default)",
    "ila": "ILA as published, SGD",
    "stage-1-path": "stage 1's own gradients along its way",
    "stage-1-gate": "stage 1's own gate gradients",
    "random order": "random orders",
}
SHORT = (
    "elimination",
    "leave-one-out",
    "shapley",
    "ila",
    "adalora",
    "gradient-norm",
    "update-norm",
    "spectrum",
    "random order",
)
NUM_MODULES = 56


def load(name):
    """A record."""
    return json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))


def markdown(titles, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def results(record, method, mask_data, data):
    """The results of one method in every cell of one data set; random orders one each."""
    return [
        result
        for cell in record["cells"]
        if cell["cell"]["data"] == data
        for result in cell["results"]
        if result["method"] == method and result["mask_data"] == mask_data
    ]


def mean_areas(record, method, mask_data):
    """Data set -> mean area over seeds."""
    return {
        data: statistics.mean(one["area"] for one in results(record, method, mask_data, data))
        for data in DATA
    }


def variants(record):
    """(method, mask data) of everything that was measured, best mean first."""
    found = dict.fromkeys(
        (one["method"], one["mask_data"]) for cell in record["cells"] for one in cell["results"]
    )
    return sorted(found, key=lambda one: statistics.mean(mean_areas(record, *one).values()))


def method_rows(record, wanted=None):
    """One row a method: mean areas, and cost in forward passes over a batch."""
    seen = {}
    for method, mask_data in variants(record):
        seen.setdefault(method, []).append(mask_data)
    rows = []
    for method, mask_data in variants(record):
        is_second = wanted is not None and mask_data != seen[method][0]
        if (wanted is not None and method not in wanted) or is_second:
            continue
        areas = mean_areas(record, method, mask_data)
        cost = results(record, method, mask_data, "alpaca")[0].get("forward_equivalents", 0)
        title = TITLES.get(method, method)
        if wanted is None and len(seen[method]) > 1:
            title += f", mask on {mask_data} data"
        numbers = [f"{area:.3f}" for area in (*areas.values(), statistics.mean(areas.values()))]
        rows.append([title, *numbers, str(cost)])
    return rows


def methods_table():
    """Every method in every data set: mean normalised area over five seeds."""
    return markdown(["method", *DATA.values(), "mean", "passes"], method_rows(load("rankings")))


def readme_table():
    """The evidence in short: mean over three data sets each, of the better mask data."""
    rows = []
    for title, *numbers, mean, cost in method_rows(load("rankings"), SHORT):
        values = [float(number) for number in numbers]
        groups = (statistics.mean(values[:3]), statistics.mean(values[3:]))
        rows.append([title, *(f"{value:.3f}" for value in groups), mean, cost])
    return markdown(["method", "built-in model", "2 M model, real text", "mean", "passes"], rows)


def against_table():
    """The default against leave-one-out and random orders, cell by cell, paired."""
    record = load("rankings")
    rows = []
    for data, name in DATA.items():
        cells = [cell for cell in record["cells"] if cell["cell"]["data"] == data]
        to_loo, num_below, num_below_all = [], 0, 0
        for cell in cells:
            found = {(r["method"], r["mask_data"]): r["area"] for r in cell["results"]}
            at_random = [r["area"] for r in cell["results"] if r["method"] == "random order"]
            own = found["elimination", "held-out"]
            to_loo.append(own - min(found["leave-one-out", m] for m in ("held-out", "train")))
            num_below += own < statistics.mean(at_random)
            num_below_all += own < min(at_random)
        mean, half = mean_and_half_width(to_loo)
        rows.append(
            [
                name,
                str(len(cells)),
                f"{mean:+.3f} ± {half:.3f}",
                f"{num_below} of {len(cells)}",
                f"{num_below_all} of {len(cells)}",
            ]
        )
    titles = ["data", "seeds", "area minus leave-one-out's better one (95 %)"]
    return markdown([*titles, "below the mean random order", "below every random order"], rows)


def mean_and_half_width(values):
    """Mean, and half the width of its 95 % interval by Student's t."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return mean, float("nan")
    error = statistics.stdev(values) / len(values) ** 0.5
    return mean, float(t.ppf(0.975, len(values) - 1)) * error


def overfit_table():
    """Where the fine-tune overfits: base, all, and the best point of each order's curve."""
    rows = []
    for cell in load("rankings")["cells"]:
        if cell["cell"]["data"] != OVERFIT:
            continue
        found = {(r["method"], r["mask_data"]): r["losses"] for r in cell["results"]}
        at_random = [r["losses"] for r in cell["results"] if r["method"] == "random order"]
        losses = cell["held_out_loss_nats"]
        own, train = found["elimination", "held-out"], found["elimination", "train"]
        best = min(range(len(own)), key=lambda point: own[point])
        means = [statistics.mean(column) for column in zip(*at_random, strict=True)]
        rows.append(
            [
                str(cell["cell"]["seed"]),
                f"{losses['base']:.3f}",
                f"{losses['tuned']:.3f}",
                f"{own[best]:.3f} ({round(NUM_MODULES * best / (len(own) - 1))})",
                f"{min(train):.3f}",
                f"{min(means):.3f}",
            ]
        )
    titles = ["seed", "base", "all modules", "best point, mask on held-out data (modules)"]
    return markdown([*titles, "best point, mask on training data", "best of random orders"], rows)


def best_share(scores, budget):
    """Indices of the best share by score, ties in model order."""
    size = round(budget * len(scores))
    return frozenset(sorted(range(len(scores)), key=lambda index: -scores[index])[:size])


def overlap(first, second, budget):
    """Jaccard index of two rankings' best shares."""
    a, b = best_share(first, budget), best_share(second, budget)
    return len(a & b) / len(a | b)


def agreement_table():
    """Seed to seed on the same data, and data to data with the same seed, beside chance."""
    record = load("rankings")
    groups = {"built-in model": list(DATA)[:3], "2 M model": list(DATA)[3:]}
    rows = []
    for method in ("elimination", "path", "ila", "leave-one-out", "update-norm"):
        for group, members in groups.items():
            scores = {
                (cell["cell"]["data"], cell["cell"]["seed"]): one["scores"]
                for cell in record["cells"]
                for one in cell["results"]
                if one["method"] == method
                and one["mask_data"] == "held-out"
                and cell["cell"]["data"] in members
            }
            kinds = {"seed": [], "data": []}
            for one, other in combinations(scores, 2):
                if one[0] == other[0]:
                    kinds["seed"].append((scores[one], scores[other]))
                elif one[1] == other[1]:
                    kinds["data"].append((scores[one], scores[other]))
            cells = []
            for pairs in kinds.values():
                for budget in (0.3, 0.75):
                    cells.append(f"{statistics.mean(overlap(*p, budget) for p in pairs):.2f}")
                cells.append(f"{statistics.mean(kendalltau(*p).statistic for p in pairs):.2f}")
            rows.append([TITLES.get(method, method), group, *cells])
    chance = [
        f"{chance_jaccard(NUM_MODULES, size, size):.2f}"
        for size in (round(0.3 * NUM_MODULES), round(0.75 * NUM_MODULES))
    ]
    rows.append(["chance", "", *chance, "0.00", *chance, "0.00"])
    titles = ["method", "model", "seeds: 30 %", "75 %", "tau-b"]
    return markdown([*titles, "data: 30 %", "75 %", "tau-b"], rows)


def checkpoints_table():
    """Agreement of each setting with the end of stage 1, or with the initial score 1."""
    record = load("checkpoints")
    rows = []
    for data in dict.fromkeys(cell["data"] for cell in record["cells"]):
        cells = [cell for cell in record["cells"] if cell["data"] == data]
        labels = [one["label"] for one in cells[0]["settings"]]
        for label in labels:
            reference = "ila from 1" if label.startswith("ila") else "at 1 of stage 1"
            if label == reference:
                continue
            pairs = []
            for cell in cells:
                scores = {one["label"]: one["scores"] for one in cell["settings"]}
                pairs.append((scores[label], scores[reference]))
            shares = [statistics.mean(overlap(*p, budget) for p in pairs) for budget in (0.3, 0.75)]
            tau = statistics.mean(kendalltau(*p).statistic for p in pairs)
            numbers = [f"{value:.2f}" for value in (*shares, tau)]
            rows.append([DATA[data], label, reference, f"{len(pairs)} seeds", *numbers])
        for label in ("at 1 of stage 1", "ila from 1"):
            scores = [
                one["scores"] for cell in cells for one in cell["settings"] if one["label"] == label
            ]
            pairs = list(combinations(scores, 2))
            shares = [statistics.mean(overlap(*p, budget) for p in pairs) for budget in (0.3, 0.75)]
            tau = statistics.mean(kendalltau(*p).statistic for p in pairs)
            numbers = [f"{value:.2f}" for value in (*shares, tau)]
            rows.append(
                [DATA[data], label, "the same, other seed", f"{len(pairs)} pairs", *numbers]
            )
    titles = ["data", "ranking", "against", "over", "Jaccard 30 %", "75 %", "tau-b"]
    return markdown(titles, rows)


RETRAINED = ("terse", "alpaca", "user")
ORDERS = ("elimination", "ila", "first", "last", "random")


def retrained(data):
    """(label, budget) -> what came of it in each cell of one data set, in order of the seeds."""
    found = {}
    for cell in load("retraining")["cells"]:
        if cell["cell"].rsplit("-", 1)[0] == data:
            for one in cell["results"]:
                found.setdefault((one["label"], one["budget"]), []).append(one)
    return found


def paired(found, key, reference):
    """Mean and half width of the held-out loss of one set minus that of another, by seed."""
    pairs = zip(found[key], found[reference], strict=True)
    return mean_and_half_width(
        [a["held_out_loss_nats"] - b["held_out_loss_nats"] for a, b in pairs]
    )


def against_all(keys, titles):
    """Rows of keys, columns of data: held-out loss against training all, and LoRA parameters."""
    rows = []
    for key, names in zip(keys, titles, strict=True):
        row = list(names)
        for data in RETRAINED:
            found = retrained(data)
            mean, half = paired(found, key, ("all", 1.0))
            size = statistics.mean(one["num_trained_parameters"] for one in found[key])
            row += [f"{mean:+.3f} ± {half:.3f}", f"{size / 1000:.0f} k"]
        rows.append(row)
    return rows


def frozen_table():
    """All but the worst quarter, trained from scratch: held-out loss minus that of all modules."""
    keys = [(f"freeze worst, {one}", 0.75) for one in ORDERS]
    rows = against_all(keys, [[TITLES.get(one, one)] for one in ORDERS])
    return markdown(["worst quarter by", *_data_titles()], rows)


def best_table():
    """The best 10 to 30 %, trained from scratch: held-out loss minus that of all modules."""
    keys = [(one, budget) for budget in (0.1, 0.2, 0.3) for one in ORDERS]
    titles = [[f"{100 * budget:g} %", TITLES.get(one, one)] for one, budget in keys]
    return markdown(["budget", "best by", *_data_titles()], against_all(keys, titles))


def _data_titles():
    return [title for data in RETRAINED for title in (DATA[data], "LoRA")]


def rivals_table():
    """At 10 %: each method's choice minus that of the default, paired by seed."""
    founds = {data: retrained(data) for data in RETRAINED[:2]}
    labels = {
        label
        for found in founds.values()
        for label, budget in found
        if budget == 0.1 and label != "elimination"
    }
    rows = []
    for label in labels:
        cells, means = [], []
        for found in founds.values():
            if (label, 0.1) not in found:
                cells.append("")
                continue
            mean, half = paired(found, (label, 0.1), ("elimination", 0.1))
            means.append(mean)
            cells.append(f"{mean:+.3f} ± {half:.3f}")
        rows.append((statistics.mean(means), [TITLES.get(label, label), *cells]))
    titles = ["best 10 % by", *(f"{DATA[data]}, against the default" for data in founds)]
    return markdown(titles, [row for _, row in sorted(rows)])


def forgotten_table():
    """The rise of the loss on text that the base model wrote itself."""
    keys = [("all", 1.0), *((one, budget) for one in ORDERS for budget in (0.1, 0.3))]
    rows = []
    for label, budget in keys:
        row = [TITLES.get(label, label), f"{100 * budget:g} %"]
        for data in RETRAINED:
            rises = [one["own_text_rise_nats"] for one in retrained(data)[label, budget]]
            row.append(f"{statistics.mean(rises):.3f}")
        rows.append(row)
    return markdown(["trained", "budget", *(DATA[data] for data in RETRAINED)], rows)


def catalogue_table():
    """Every method of the table, with a link to the file that scores."""
    from keylayers.scores.methods import BUILT_IN

    rows = []
    for method in BUILT_IN:
        file = method.function.split(":")[0].rsplit(".", 1)[1]
        options = ", ".join(f"`{name}`" for name in method.option_names) or "none"
        link = f"[{file}.py](../src/keylayers/scores/{file}.py)"
        rows.append([f"`{method.name}`", method.title, link, method.source, options])
    return markdown(["method", "score", "formula, cost, blind spots", "source", "options"], rows)


def own_code_table():
    """Our scores of rivals against the authors' own code."""
    record = load("own_code")
    rows = [
        [
            name,
            str(record[name]["num_scores"]),
            f"{record[name]['largest_relative_difference']:.1e}" if "tau_b" in record[name] else "",
            f"{record[name]['tau_b']:.3f}"
            if "tau_b" in record[name]
            else ("the same" if record[name]["same_selected"] else "another") + " 30 %",
            f"{statistics.median(record[name]['own_code_seconds']):.2f}",
            f"{statistics.median(record[name]['seconds']):.2f}",
        ]
        for name in ("spectrum", "kappatune", "plop", "aletheia")
    ]
    titles = ["rival", "scores", "largest relative difference", "tau-b", "its seconds", "ours"]
    return markdown(titles, rows)


def planted_line():
    """How many planted truths were found, and how many draws were none."""
    record = load("planted")
    by_kind = {kind: [] for kind in ("nothing", "noise")}
    for one in record["trials"]:
        by_kind[one["others"]].append(one["is_found"])
    parts = [f"{sum(found)} of {len(found)} with {kind}" for kind, found in by_kind.items()]
    num_trials, num_useless = len(record["trials"]), record["num_useless"]
    return (
        f"{record['num_found']} of {num_trials} trials ({', '.join(parts)}); {num_useless} of "
        f"{num_trials + num_useless} draws were left out"
    )


TABLES = (
    readme_table,
    methods_table,
    against_table,
    overfit_table,
    agreement_table,
    checkpoints_table,
    frozen_table,
    best_table,
    rivals_table,
    forgotten_table,
    catalogue_table,
    own_code_table,
    planted_line,
)

if __name__ == "__main__":
    for make in TABLES:
        print(make(), end="\n\n")
