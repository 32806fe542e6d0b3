# SPDX-License-Identifier: Apache-2.0
"""Tables of the real model's study (`recipes/real`) and of how scores predict retraining."""

import statistics

import torch
from scipy.stats import spearmanr

from keylayers.scores.gradient_path import sum_of_shares

from findings import GROUPS
from tables import interval, load, markdown

KINDS = {"subsets": "10 to 50 %", "one size": "20 %"}
CONTROLS = {
    "number of modules": lambda sizes: [1.0] * len(sizes),
    "LoRA parameters": lambda sizes: [*sizes.values()],
}
SHOWN = (
    "gradient-path",
    "gradient-norm",
    "path",
    "step-scores",
    "step-scores of 10 steps",
    "fisher",
    "elimination",
    "ila",
    "leave-one-out",
    "update-norm",
    "spectrum",
    "LoRA parameters",
)
ORDERS = {
    "best": "the best",
    "random": "random (3 draws)",
    "mlp": "random MLPs",
    "last": "the last",
    "worst": "the worst",
}


def masks_table():
    """Validation loss with only some updates of the fine-tune kept, means over seeds."""
    cells = [cell for name, cell in load("real")["masks"].items() if name.startswith("trec")]

    def shown(order, size):
        found = [
            one["validation_nats"]
            for cell in cells
            for one in cell["masks"]
            if (one["order"], one["size"]) == (order, size)
        ]
        spread = f" ({min(found):.2f} to {max(found):.2f})" if order == "random" else ""
        return f"{statistics.mean(found):.2f}{spread}"

    sizes = sorted({one["size"] for cell in cells for one in cell["masks"]})
    none, every = (statistics.mean(cell[end] for cell in cells) for end in ("base", "all"))
    rows = [
        ["none", *[f"{none:.2f}"] * len(ORDERS)],
        *([f"{100 * size:.0f} %", *(shown(order, size) for order in ORDERS)] for size in sizes),
        ["all", *[f"{every:.2f}"] * len(ORDERS)],
    ]
    return markdown(["kept", *ORDERS.values()], rows)


def arms_table():
    """Trainings from scratch at each arm's own learning rate, means over seeds (and the range).

    Arms that only the first seed has are still being run.
    """
    results = [one for one in load("real")["results"] if one["data"] == "trec"]
    arms = {arm: _at_its_rate(results, arm) for arm in dict.fromkeys(r["arm"] for r in results)}
    every = {one["seed"]: one["test_nats"] for one in arms["all 1"]}
    rows = [[_title(arm), *_measured(own, every)] for arm, own in arms.items() if len(own) > 1]
    titles = ["trained", "seeds", "rate", "LoRA parameters", "correct", "loss"]
    return markdown([*titles, "minus that of all", "Alpaca's loss", "CPU s a step"], rows)


def _title(arm):
    """`best 0.3, as many parameters` in the words of a table."""
    order, _, rest = arm.partition(" ")
    if order in ("base", "all"):
        return {"base": "nothing (base)", "all": "all"}[order]
    size, _, more = rest.partition(",")
    words = ORDERS.get(order, f"by {order}").replace(" (3 draws)", "")
    return f"{words}, {float(size):.0%}".replace("%", " %") + (more and f",{more}")


def _at_its_rate(results, arm):
    """The results of an arm at the rate that the first seed chose, of all seeds that have it."""
    own = [one for one in results if one["arm"] == arm]
    tried = [one for one in own if one["seed"] == 0]
    rate = min(tried, key=lambda one: one["validation_nats"] + one.get("training_nats", 0))["rate"]
    return [one for one in own if one["rate"] == rate]


def _measured(own, every):
    """What a row shows of an arm's results; `every` has the loss of training all, by seed."""
    right = [100 * one["is_right"].count("1") / len(one["is_right"]) for one in own]
    yield str(len(own))
    is_trained = own[0]["arm"] != "base"
    yield f"{own[0]['rate']:g}" if is_trained else ""
    counts = [one.get("num_trained_parameters", 0) for one in own]
    yield f"{statistics.mean(counts) / 1e6:.1f} M" if any(counts) else "0"
    yield _with_range(right, ".1f") + " %"
    yield _with_range([one["test_nats"] for one in own], ".3f")
    apart = [one["test_nats"] - every[one["seed"]] for one in own if one["seed"] in every]
    yield interval(apart) if is_trained and any(apart) and len(apart) > 1 else ""
    yield _with_range([one["forgetting_nats"] for one in own], ".2f")
    seconds = [one["step_cpu_seconds"] for one in own if "step_cpu_seconds" in one]
    yield f"{statistics.mean(seconds):.1f}" if seconds else ""


def _with_range(values, how):
    """The mean, with the lowest and the highest if there are several."""
    low, mean, high = (format(of(values), how) for of in (min, statistics.mean, max))
    return mean if low == high else f"{mean} ({low} to {high})"


def retrain_table():
    """`prediction_table` of a few methods, for subsets of one size."""
    return prediction_table(SHOWN, ["one size"])


def prediction_table(methods=None, kinds=KINDS):
    """Spearman's correlation of sums of scores with minus the losses of retrained subsets.

    Means over the cells of a model, with the lowest and the highest.
    """
    cells = [_with_sum(cell) for cell in load("subsets")["cells"]]
    models = {
        title.removesuffix(" model"): [cell for cell in cells if cell["cell"]["data"] in group]
        for title, group in GROUPS.items()
    }
    columns = {
        f"{model}, {KINDS[kind]} ({len(having)})": (kind, having)
        for model, own in models.items()
        for kind in kinds
        if (having := [cell for cell in own if any(r["kind"] == kind for r in cell["runs"])])
    }
    rows = []
    for method in methods or (*cells[0]["scores"], *CONTROLS):
        found = [
            [correlation(cell, method, kind) for cell in having]
            for kind, having in columns.values()
        ]
        shown = [_with_range(one, ".2f") for one in found]
        rows.append((statistics.mean(map(statistics.mean, found)), [method, *shown]))
    rows.sort(key=lambda row: -row[0])
    return markdown(["sum of", *columns], [row for _, row in rows])


def _with_sum(cell):
    """The cell with the scores of `gradient-path`; older cells have only the two that it adds."""
    both = (cell["scores"][name] for name in ("gradient-norm", "path"))
    sums = sum_of_shares(*(torch.tensor([scores]).double() for scores in both))[0].tolist()
    return cell | {"scores": {"gradient-path": sums} | cell["scores"]}


def correlation(cell, method, kind):
    """Over the cell's subsets of one kind; 0 if all have the same sum."""
    sizes = cell["num_parameters"]
    own = CONTROLS[method](sizes) if method in CONTROLS else cell["scores"][method]
    scores = dict(zip(sizes, own, strict=True))
    runs = [run for run in cell["runs"] if run["kind"] == kind]
    sums = [sum(scores[name] for name in run["modules"]) for run in runs]
    losses = [-run["held_out_loss_nats"] for run in runs]
    return float(spearmanr(sums, losses).statistic) if len(set(sums)) > 1 else 0.0


TABLES = (masks_table, arms_table, retrain_table, prediction_table)
