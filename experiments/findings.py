# SPDX-License-Identifier: Apache-2.0
"""The tables of README.md, docs/claims.md and docs/methods.md, made from the records.

python experiments/findings.py       # writes them into the pages; a test compares

A page holds a table between `<!-- name -->` and `<!-- /name -->`, where name is a function below.
"""

import json
import re
import statistics
from itertools import combinations, product
from pathlib import Path

from scipy.stats import kendalltau, t

from keylayers.ranking.compare import chance_jaccard

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "experiments" / "records"
DATA = {
    "polite": "demo, polite",
    "list": "demo, list",
    "terse": "demo, terse",
    "alpaca": "2 M, Alpaca-GPT4",
    "dpo": "2 M, chosen answers",
    "user": "2 M, user-oriented",
}
MODELS = ("built-in model", "2 M model, real text")
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
AGREEMENT = ("elimination", "path", "ila", "leave-one-out", "update-norm")


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
    """One row per method: mean areas, passes over a batch, seconds."""
    seen = {}
    for method, mask_data in variants(record):
        seen.setdefault(method, []).append(mask_data)
    rows = []
    for method, mask_data in variants(record):
        is_second = wanted is not None and mask_data != seen[method][0]
        if (wanted is not None and method not in wanted) or is_second:
            continue
        areas = mean_areas(record, method, mask_data)
        found = [one for data in DATA for one in results(record, method, mask_data, data)]
        cost = results(record, method, mask_data, "alpaca")[0].get("forward_equivalents", 0)
        seconds = statistics.mean(one.get("seconds", 0.0) for one in found)
        title = TITLES.get(method, method)
        if wanted is None and len(seen[method]) > 1:
            title += f", mask on {mask_data} data"
        values = [*areas.values()]
        means = (values[:3], values[3:], values)  # built-in model, english-2m, all
        numbers = [f"{statistics.mean(part):.3f}" for part in means]
        rows.append([title, *numbers, str(cost), f"{seconds:.1f}"])
    return rows


def methods_table():
    """Every method in every data set: mean normalised area over five seeds."""
    titles = ["method", *MODELS, "mean", "passes", "seconds"]
    return markdown(titles, method_rows(load("rankings")))


def readme_table():
    """The evidence in short: the better mask data of the best-known methods."""
    rows = [row[:-1] for row in method_rows(load("rankings"), SHORT)]
    return markdown(["method", *MODELS, "mean", "passes"], rows)


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
                f"{mean:+.3f}±{half:.3f}",
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


def best_share(scores, budget):
    """Indices of the best share by score, ties in model order."""
    size = round(budget * len(scores))
    return frozenset(sorted(range(len(scores)), key=lambda index: -scores[index])[:size])


def overlap(first, second, budget):
    """Jaccard index of two rankings' best shares."""
    a, b = best_share(first, budget), best_share(second, budget)
    return len(a & b) / len(a | b)


def agreement(pairs):
    """Mean Jaccard index of the best 30 % and 75 %, and Kendall's tau-b, of pairs of rankings."""
    shares = [statistics.mean(overlap(*pair, budget) for pair in pairs) for budget in (0.3, 0.75)]
    tau = statistics.mean(kendalltau(*pair).statistic for pair in pairs)
    return [f"{value:.2f}" for value in (*shares, tau)]


def agreement_table():
    """Seed to seed on the same data, and data to data with the same seed, next to chance."""
    record = load("rankings")
    rows = []
    groups = {"built-in model": [*DATA][:3], "2 M model": [*DATA][3:]}
    for method, (group, members) in product(AGREEMENT, groups.items()):
        scores = {
            (cell["cell"]["data"], cell["cell"]["seed"]): found["scores"]
            for cell in record["cells"]
            if cell["cell"]["data"] in members
            for found in cell["results"]
            if (found["method"], found["mask_data"]) == (method, "held-out")
        }
        pairs = [*combinations(scores, 2)]
        row = [TITLES.get(method, method), group]
        for same in (0, 1):  # the data, then the seed
            row += agreement([(scores[a], scores[b]) for a, b in pairs if a[same] == b[same]])
        rows.append(row)
    sizes = (round(0.3 * NUM_MODULES), round(0.75 * NUM_MODULES))
    chance = [*(f"{chance_jaccard(NUM_MODULES, size, size):.2f}" for size in sizes), "0.00"]
    rows.append(["chance", "", *chance, *chance])
    titles = ["method", "model", "seeds: 30 %", "75 %", "tau-b"]
    return markdown([*titles, "data: 30 %", "75 %", "tau-b"], rows)


def checkpoints_table():
    """Agreement of each setting with the end of stage 1, or with the initial score 1."""
    cells = load("checkpoints")["cells"]
    rows = []
    for data in dict.fromkeys(cell["data"] for cell in cells):
        scores = {}
        for cell in cells:
            for setting in cell["settings"] if cell["data"] == data else ():
                scores.setdefault(setting["label"], []).append(setting["scores"])
        ends = ("at 1 of stage 1", "ila from 1")
        for label in scores:
            if label not in ends:
                end = ends[label.startswith("ila")]
                pairs = [*zip(scores[label], scores[end], strict=True)]
                rows.append([DATA[data], label, end, f"{len(pairs)} seeds", *agreement(pairs)])
        for end in ends:
            pairs = [*combinations(scores[end], 2)]
            row = [DATA[data], end, "the same, other seed", f"{len(pairs)} pairs"]
            rows.append([*row, *agreement(pairs)])
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


def best_table():
    """Trained from scratch: held-out loss minus that of all modules, and LoRA parameters."""
    keys = [(one, budget) for budget in (0.1, 0.3) for one in ORDERS]
    rows = []
    for key in [*keys, *((f"freeze worst, {one}", 0.75) for one in ORDERS)]:
        label = key[0].removeprefix("freeze worst, ")
        what = "all but worst 25 %" if label != key[0] else f"best {100 * key[1]:g} %"
        row = [what, TITLES.get(label, label)]
        for data in RETRAINED:
            found = retrained(data)
            mean, half = paired(found, key, ("all", 1.0))
            size = statistics.mean(one["num_trained_parameters"] for one in found[key])
            row.append(f"{mean:+.3f}±{half:.3f} ({size / 1000:.0f}k)")
        rows.append(row)
    return markdown(["trained", "chosen by", *(DATA[data] for data in RETRAINED)], rows)


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
            cells.append(f"{mean:+.3f}±{half:.3f}")
        rows.append((statistics.mean(means), [TITLES.get(label, label), *cells]))
    titles = ["best 10 % by", *(f"{DATA[data]}, against the default" for data in founds)]
    return markdown(titles, [row for _, row in sorted(rows)])


def forgotten_table():
    """The rise of the loss on text that the base model wrote itself."""
    keys = [("all", 1.0)]
    keys += [(one, budget) for one in ("elimination", "last", "random") for budget in (0.1, 0.3)]
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
        link = f"[`{method.name}`](../src/keylayers/scores/{file}.py)"
        rows.append([link, method.title, method.source])
    return markdown(["method", "score", "source"], rows)


def own_code_table():
    """Our scores of rivals against the authors' own code."""
    rows = []
    for name in ("spectrum", "kappatune", "plop", "aletheia"):
        found = load("own_code")[name]
        if "tau_b" in found:
            agreed = [f"{found['largest_relative_difference']:.1e}", f"{found['tau_b']:.3f}"]
        else:
            agreed = ["", ("the same" if found["same_selected"] else "another") + " 30 %"]
        times = (statistics.median(found[side]) for side in ("own_code_seconds", "seconds"))
        rows.append([name, str(found["num_scores"]), *agreed, *(f"{one:.2f}" for one in times)])
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
    catalogue_table,
    own_code_table,
    agreement_table,
    checkpoints_table,
    best_table,
    rivals_table,
    forgotten_table,
    against_table,
    planted_line,
)
PAGES = ("README.md", "docs/methods.md", "docs/claims.md")


def page(path, tables=TABLES):
    """The text of a page with every table between its marks made from the records."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for make in tables:
        name = make.__name__
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = mark.sub(lambda match, make=make: f"{match[1]}{make()}\n{match[2]}", text)
    return text


def main():
    """Write the tables into the pages."""
    import small_study

    for path in PAGES:
        (ROOT / path).write_text(page(path, (*TABLES, *small_study.TABLES)), encoding="utf-8")


if __name__ == "__main__":
    main()
