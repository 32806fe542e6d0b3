# SPDX-License-Identifier: Apache-2.0
"""Tables of the real model's study (`recipes/real`) and of how scores predict retraining."""

import statistics

from scipy.stats import spearmanr

from findings import DATA
from tables import load, markdown

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


def real_retraining_table():
    """Trainings from scratch on TREC at each arm's best learning rate: the official test set."""
    results = [one for one in load("real")["results"] if one["data"] == "trec"]
    arms = list(dict.fromkeys(one["arm"] for one in results))
    rows = []
    for arm in arms:
        own = [one for one in results if one["arm"] == arm]
        rates = {one["rate"] for one in own if one["seed"] == 0}
        rate = min(rates, key=lambda rate: new_loss(own, rate)) if arm != "base" else 1.0
        chosen = [one for one in own if one["rate"] == rate]
        is_right = [one["is_right"].count("1") / len(one["is_right"]) for one in chosen]
        rows.append(
            [
                arm,
                str(chosen[0].get("num_modules", 0)),
                f"{chosen[0].get('num_trained_parameters', 0):,}",
                f"{rate:g} of {len(rates)}" if arm != "base" else "",
                str(len(chosen)),
                f"{statistics.mean(one['test_nats'] for one in chosen):.3f}",
                f"{100 * statistics.mean(is_right):.1f}",
                f"{statistics.mean(one['forgetting_nats'] for one in chosen):.2f}",
            ]
        )
    titles = ["trained", "modules", "parameters", "rate, of tried", "seeds", "test nats"]
    return markdown([*titles, "accuracy, %", "Alpaca nats"], rows)


def new_loss(own, rate):
    """What the learning rate is chosen by, on the first seed."""
    (one,) = [one for one in own if one["seed"] == 0 and one["rate"] == rate]
    return one["validation_nats"] + one["training_nats"]


def prediction_table():
    """Spearman's correlation of sums of scores with the losses of random subsets, retrained."""
    cells = load("subsets")["cells"]
    data = list(dict.fromkeys(cell["cell"]["data"] for cell in cells))
    methods = dict.fromkeys(name for cell in cells for name in all_scores(cell))
    found = {
        method: [
            statistics.mean(
                predicted(cell, all_scores(cell)[method])
                for cell in cells
                if cell["cell"]["data"] == name
            )
            for name in data
        ]
        for method in methods
    }
    order = sorted(found, key=lambda method: -statistics.mean(found[method]))
    rows = [[method, *(f"{value:.2f}" for value in found[method])] for method in order]
    return markdown(["sum of", *(DATA[name] for name in data)], rows)


def all_scores(cell):
    """Every method's scores of one cell, and the controls."""
    sizes = [*cell["num_parameters"].values()]
    controls = {"1 (number of modules)": [1.0] * len(sizes), "LoRA parameters": sizes}
    return cell["scores"] | controls


def predicted(cell, scores):
    """Spearman's correlation of minus the loss with the sum of the scores, over all subsets."""
    by_name = dict(zip(cell["num_parameters"], scores, strict=True))
    sums = [sum(by_name[name] for name in run["modules"]) for run in cell["runs"]]
    losses = [-run["held_out_loss_nats"] for run in cell["runs"]]
    return float(spearmanr(sums, losses).statistic)


TABLES = (masks_table,)
