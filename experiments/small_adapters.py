# SPDX-License-Identifier: Apache-2.0
"""Tables of docs/parts.md: how small an adapter can be (`parts.py`, `healing.py`)."""

from functools import cache
from itertools import product

import numpy as np
import pandas as pd

from findings import DATA
from tables import interval, load, markdown

RIVALS = (
    "uniform rank",
    "singular value",
    "energy per parameter",
    "share of energy",
    "ratio to the largest",
)
OURS = ("fisher-pruning", "elimination", "path", "price", "ila", "modules by elimination")
SHOWN = ("uniform rank", "modules by elimination", "random", "all")  # of trained adapters
GRID = np.geomspace(0.01, 1, 40)  # shares of the adapter's parameters
MARGIN_NATS = 0.01


@cache
def curves(record):
    """Each order in each cell: excess loss over the full adapter at `GRID`, at 5 %, and size."""
    rows = []
    for cell in load(record)["cells"]:
        for found in cell["results"]:
            sizes = np.array(found["num_parameters"][1:]) / found["num_parameters"][-1]
            excess = np.array(found["losses"][1:]) - found["losses"][-1]
            last = np.append(np.diff(sizes) > 0, True)  # of counts that buy the same parts
            logs, excess = np.log(sizes[last]), excess[last]
            kind = "random" if found["order"].startswith("random") else found["order"]
            rows.append(
                cell["cell"]
                | {"order": kind, "curve": np.interp(np.log(GRID), logs, excess)}
                | {"at 5 %": float(np.interp(np.log(0.05), logs, excess))}
                | {"log size": _smallest(logs, excess)}
            )
    return pd.DataFrame(rows)


def _smallest(logs, excess):
    """Log of the smallest size from which on the excess stays within the margin."""
    above = np.nonzero(excess > MARGIN_NATS)[0]
    if len(above) == 0:
        return float(logs[0])
    low = above[-1]
    share = (excess[low] - MARGIN_NATS) / (excess[low] - excess[low + 1])
    return float(logs[low] + share * (logs[low + 1] - logs[low]))


@cache
def of_data(data, record="parts", order=None):
    """Order -> means over the seeds of one data set: curve, area, at 5 %, size; and how many.

    If `order` is given, over the seeds that have it.
    """
    found = curves(record)
    own = found[found["data"] == data]
    if order is not None:
        own = own[own["seed"].isin(own[own["order"] == order]["seed"])]
    means = {}
    for name, of_order in own.groupby("order", sort=False):
        curve = np.mean(np.stack(of_order["curve"].to_list()), axis=0)
        means[name] = {
            "curve": curve,
            "area": float(np.trapezoid(curve, np.log(GRID))),
            "at 5 %": of_order["at 5 %"].mean(),
            "size": float(np.exp(of_order["log size"].mean())),
        }
    return means, own["seed"].nunique()


def parts_table():
    """Fisher pruning of LoRA's parts next to the best rival by singular values, by data set."""
    return _against_rivals("parts", "modules by elimination")


def extract_table():
    """Fisher pruning of extracted adapters next to the best rival by singular values."""
    return _against_rivals("extract", "uniform rank")


def _against_rivals(record, shown):
    rows = []
    for data, title in DATA.items():
        means, num_seeds = of_data(data, record)
        if not means:
            continue
        ours, rivals = means["fisher-pruning"], [means[name] for name in RIVALS]
        best = {key: min(rival[key] for rival in rivals) for key in ("area", "at 5 %", "size")}
        lowest = np.min([rival["curve"] for rival in rivals], axis=0)
        rows.append(
            [
                f"{title} ({num_seeds})",
                *(f"{ours[key] / best[key]:.2f}" for key in ("area", "at 5 %", "size")),
                f"{max(ours['curve'] - lowest):+.4f} ({_worst_seed(data, record):+.4f})",
                f"{ours['at 5 %']:.3f} / {best['at 5 %']:.3f} / {means[shown]['at 5 %']:.3f}",
                f"{ours['size']:.0%} / {best['size']:.0%}",
            ]
        )
    titles = [
        "data (seeds)",
        "area",
        "at 5 %",
        "size",
        "worst",
        f"nats at 5 %: ours / best / {shown}",
    ]
    return markdown([*titles, "size: ours / best"], rows)


def _worst_seed(data, record):
    """How far Fisher pruning's curve is above the best rival's at most, in any seed."""
    found = curves(record)
    worst = []
    for _, cell in found[found["data"] == data].groupby("seed"):
        curve = cell.drop_duplicates("order").set_index("order")["curve"]
        worst.append(max(curve["fisher-pruning"] - np.min([*curve[[*RIVALS]]], axis=0)))
    return max(worst)


def parts_orders():
    """Every order of the parts, in areas of the best rival's, mean over data sets."""
    rows = []
    for order in (*OURS, *RIVALS, "random"):
        cells = []
        for data in DATA:
            means, _ = of_data(data, order=order)
            if means:
                best = min(means[rival]["area"] for rival in RIVALS)
                cells.append(f"{means[order]['area'] / best:.2f}")
        rows.append([order, *cells])
    shown = [title for data, title in DATA.items() if of_data(data)[0]]
    return markdown(["order", *shown], rows)


def healing_table():
    """Losses after training: cut adapters (healed), and new matrices with the ranks (retrained)."""
    rows = []
    found = at_best_rates("healing", ["kind", "order"])
    for data, kind in product(DATA, ("healed", "retrained")):
        trained = found.get((data, kind))
        if trained is None or "all" not in trained.index.get_level_values("order"):  # the last
            continue
        after = trained["held_out_loss_nats"].unstack("order")
        before = trained["before_nats"].unstack("order").mean()
        ours, best = "fisher-pruning", after[[*RIVALS]].mean().idxmin()
        means = after.mean()
        rows.append(
            [
                f"{DATA[data]} ({len(after)})",
                kind,
                f"{before[ours]:.3f} / {before[best]:.3f}" if kind == "healed" else "",
                f"{means[ours]:.3f} / {means[best]:.3f} ({best})",
                interval(after[ours] - after[best]),
                *(f"{means[label]:.3f}" for label in SHOWN),
            ]
        )
    titles = ["data (seeds)", "trained", "before: ours / best", "after: ours / best", "paired"]
    return markdown([*titles, *SHOWN], rows)


def at_best_rates(record, arm):
    """(data, first of `arm`) -> results by seed and the rest of `arm`, of seeds that have it all.

    Each at the learning rate that the first seed chose by the loss on the mask data.
    """
    found = pd.DataFrame(
        cell["cell"] | result for cell in load(record)["cells"] for result in cell["results"]
    )
    keys = ["data", *arm]
    of_first = found[found["seed"] == 0].sort_values("mask_loss_nats").drop_duplicates(keys)
    chosen = found.merge(of_first[[*keys, "rate"]], on=[*keys, "rate"])
    tables = {}
    for key, own in chosen.groupby(keys[:2], sort=False):
        counts = own.groupby("seed").size()
        complete = counts[counts == counts.max()].index
        tables[key] = own[own["seed"].isin(complete)].set_index(["seed", *arm[1:]])
    return tables


TABLES = (parts_table, extract_table, parts_orders, healing_table)
