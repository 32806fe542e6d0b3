# SPDX-License-Identifier: Apache-2.0
"""Tables of the real model's study (`recipes/real`) and of how scores predict retraining."""

import statistics
from collections import defaultdict

from scipy.stats import spearmanr

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


def prediction_table():
    """Spearman's correlation of sums of scores with minus the losses of retrained subsets."""
    (cell,) = load("subsets")["cells"]
    sizes = cell["num_parameters"]
    controls = {"number of modules": [1.0] * len(sizes), "LoRA parameters": [*sizes.values()]}
    by_size = defaultdict(list)
    for run in cell["runs"]:
        by_size[len(run["modules"])].append(run)
    found = []
    for method, scores in (cell["scores"] | controls).items():
        own = dict(zip(sizes, scores, strict=True))
        within = statistics.mean(correlation(own, runs) for runs in by_size.values())
        found.append((method, correlation(own, cell["runs"]), within))
    found.sort(key=lambda one: -one[2])
    rows = [[method, f"{over_all:.2f}", f"{within:.2f}"] for method, over_all, within in found]
    return markdown(["sum of", "all subsets", "within a size"], rows)


def correlation(scores, runs):
    """Over subsets; 0 if all have the same sum."""
    sums = [sum(scores[name] for name in run["modules"]) for run in runs]
    losses = [-run["held_out_loss_nats"] for run in runs]
    return float(spearmanr(sums, losses).statistic) if len(set(sums)) > 1 else 0.0


TABLES = (masks_table, prediction_table)
