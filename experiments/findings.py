# SPDX-License-Identifier: Apache-2.0
"""What the experiments found: tables of README.md, RESULTS.md, docs/claims.md, docs/methods.md.

`pages.py` writes them into the pages. Differences are paired by seed, ± is half of a 95 % interval.
"""

import statistics
from itertools import combinations, product

import pandas as pd
from scipy.stats import kendalltau

from keylayers.ranking.compare import chance_jaccard
from keylayers.scores.methods import BUILT_IN

from tables import interval, load, markdown

DATA = {
    "polite": "demo, polite",
    "list": "demo, list",
    "terse": "demo, terse",
    "alpaca": "2 M, Alpaca-GPT4",
    "dpo": "2 M, chosen answers",
    "user": "2 M, user-oriented",
}
GROUPS = {"built-in model": [*DATA][:3], "2 M model": [*DATA][3:]}
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
RETRAINED = ("terse", "alpaca", "user")
ORDERS = ("elimination", "ila", "first", "last", "random")


def scored():
    """Every method in every cell of `DATA`, one row each: data, seed, method, area, cost."""
    free = {"mask_data": "", "forward_equivalents": 0, "seconds": 0.0}  # where none is recorded
    return pd.DataFrame(
        cell["cell"] | free | {k: v for k, v in result.items() if v is not None}
        for cell in load("rankings")["cells"]
        if cell["cell"]["data"] in DATA
        for result in cell["results"]
    )


def mean_areas(table):
    """(method, mask data) -> mean area in each data set, over seeds; best first."""
    areas = table.pivot_table("area", ["method", "mask_data"], "data")[[*DATA]]
    return areas.loc[areas.mean(axis=1).sort_values().index]


def method_rows(is_short=False):
    """One row per method and mask data: mean areas, passes over a batch, seconds.

    If short, only the best-known methods, with the mask data that suits each best.
    """
    table = scored()
    areas = mean_areas(table)
    names = areas.index.get_level_values("method")
    is_on_both = names.duplicated(keep=False)
    if is_short:
        areas, is_on_both = areas[names.isin(SHORT) & ~names.duplicated()], [False] * len(SHORT)
    cells = table.groupby(["method", "mask_data"])
    rows = []
    for (key, values), is_named in zip(areas.iterrows(), is_on_both, strict=True):
        title = TITLES.get(key[0], key[0]) + (f", mask on {key[1]} data" if is_named else "")
        means = (values[part].mean() for part in (*GROUPS.values(), [*DATA]))
        cell = cells.get_group(key)
        passes = cell[cell["data"] == "alpaca"]["forward_equivalents"].iloc[0]
        seconds = cell["seconds"].mean()
        rows.append([title, *(f"{mean:.3f}" for mean in means), f"{passes:.0f}", f"{seconds:.1f}"])
    return rows


def methods_table():
    """Every method in every data set: mean normalised area over five seeds."""
    return markdown(["method", *MODELS, "mean", "passes", "seconds"], method_rows())


def readme_table():
    """The evidence in short."""
    rows = [row[:-1] for row in method_rows(is_short=True)]
    return markdown(["method", *MODELS, "mean", "passes"], rows)


def against_table():
    """The default against leave-one-out and random orders, cell by cell."""
    rows = []
    for data, cells in scored().groupby("data", sort=False):
        areas = cells.pivot_table("area", "seed", ["method", "mask_data"])
        own = areas["elimination", "held-out"]
        at_random = cells[cells["method"] == "random order"].groupby("seed")["area"]
        numbers = [(own < limit).sum() for limit in (at_random.mean(), at_random.min())]
        below = [f"{number} of {len(own)}" for number in numbers]
        to_loo = interval(own - areas["leave-one-out"].min(axis=1))
        rows.append([DATA[data], str(len(own)), to_loo, *below])
    titles = ["data", "seeds", "area minus leave-one-out's better one (95 %)"]
    return markdown([*titles, "below the mean random order", "below every random order"], rows)


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
    table = scored()
    rows = []
    for method, (group, members) in product(AGREEMENT, GROUPS.items()):
        chosen = table[
            (table["method"] == method)
            & (table["mask_data"] == "held-out")
            & table["data"].isin(members)
        ]
        scores = chosen.set_index(["data", "seed"])["scores"]
        pairs = [*combinations(scores.index, 2)]
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


def retrained(data):
    """What was trained from scratch on one data set: one column per measure and set, by seed.

    A set is named by what chose it and its budget: "elimination 0.3".
    """
    table = pd.DataFrame(
        result | {"cell": cell["cell"], "set": f"{result['label']} {result['budget']:g}"}
        for cell in load("retraining")["cells"]
        for result in cell["results"]
        if cell["cell"].rsplit("-", 1)[0] == data
    )
    measures = ["held_out_loss_nats", "own_text_rise_nats", "num_trained_parameters"]
    return table.pivot(index="cell", columns="set", values=measures)


def best_table():
    """Trained from scratch: held-out loss minus that of all modules, and LoRA parameters."""
    sets = [("", method, budget) for budget in (0.1, 0.3) for method in ORDERS]
    sets += [("freeze worst, ", method, 0.75) for method in ORDERS]
    tables = [retrained(data) for data in RETRAINED]
    rows = []
    for prefix, method, budget in sets:
        what = "all but worst 25 %" if prefix else f"best {100 * budget:g} %"
        row = [what, TITLES.get(method, method)]
        for table in tables:
            losses = table["held_out_loss_nats"]
            name = f"{prefix}{method} {budget:g}"
            size = table["num_trained_parameters"][name].mean() / 1000
            row.append(f"{interval(losses[name] - losses['all 1'])} ({size:.0f}k)")
        rows.append(row)
    return markdown(["trained", "chosen by", *(DATA[data] for data in RETRAINED)], rows)


def rivals_table():
    """At 10 %: each method's choice minus that of the default, paired by seed."""
    losses = [retrained(data)["held_out_loss_nats"] for data in RETRAINED[:2]]
    labels = {
        name.removesuffix(" 0.1") for table in losses for name in table if name.endswith(" 0.1")
    }
    rows = []
    for label in labels - {"elimination"}:
        differences = [
            table[f"{label} 0.1"] - table["elimination 0.1"] if f"{label} 0.1" in table else []
            for table in losses
        ]
        mean = statistics.mean(found.mean() for found in differences if len(found))
        cells = [interval(found) if len(found) else "" for found in differences]
        rows.append((mean, [TITLES.get(label, label), *cells]))
    titles = [f"{DATA[data]}, against the default" for data in RETRAINED[:2]]
    return markdown(["best 10 % by", *titles], [row for _, row in sorted(rows)])


def forgotten_table():
    """The rise of the loss on text that the base model wrote itself."""
    rises = [retrained(data)["own_text_rise_nats"] for data in RETRAINED]
    sets = [("all", 1.0), *product(("elimination", "last", "random"), (0.1, 0.3))]
    rows = []
    for label, budget in sets:
        means = [f"{table[f'{label} {budget:g}'].mean():.3f}" for table in rises]
        rows.append([TITLES.get(label, label), f"{100 * budget:g} %", *means])
    return markdown(["trained", "budget", *(DATA[data] for data in RETRAINED)], rows)


def catalogue_table():
    """Every method of the table, with a link to the file that scores."""
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
    trials = pd.DataFrame(record["trials"])
    parts = [
        f"{found.sum()} of {len(found)} with {others}"
        for others, found in trials.groupby("others", sort=False)["is_found"]
    ]
    num_draws = len(trials) + record["num_useless"]
    return (
        f"{record['num_found']} of {len(trials)} trials ({', '.join(parts)}); "
        f"{record['num_useless']} of {num_draws} draws were left out"
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
