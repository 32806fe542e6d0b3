# SPDX-License-Identifier: Apache-2.0
"""How small an adapter can be: mask curves of rank-one parts, against orders by singular values.

    python experiments/parts.py CELLS_FOLDER --shared SHARED_FOLDER [--collect RECORD]

LoRA of rank 16 on all modules. Every method scores the parts (or the modules, `modules by ...`) on
mask data; the curve is the held-out loss with the best parts kept, over their parameters, nothing
retrained. Controls: random orders. A finished cell is not run again.
"""

import json
import random
from dataclasses import replace

import torch

from keylayers.environment import environment
from keylayers.evaluation.held_out import mask_curve
from keylayers.evaluation.verify import orders_by_singular_values
from keylayers.files import write_json
from keylayers.gates import part_name, part_sizes
from keylayers.ranking.parts import parts_in_order
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options
from keylayers.training.rank_modules import to_ranking

import cells
from rankings import best_first

NUM_POINTS = 22
NUM_RANDOM_ORDERS = 3
METHODS = {"fisher-pruning": {}, "elimination": {}}
OTHER_METHODS = {  # of the first two seeds where they take most of the time, on the 2 M model
    "fisher-pruning, 16 batches": {"mask_batches": 16},
    "elimination, 16 batches": {"mask_batches": 16},
    "path": {},
    "ila": {},
    "price": {},
}


class PartCell(cells.Cell):
    """A cell of rank 16, also on the built-in model."""

    @property
    def name(self):
        """Its folder."""
        return f"parts-{super().name}"

    def training(self):
        """How it is fine-tuned."""
        return replace(super().training(), lora_rank=16, lora_alpha=32)


def by_parts(loaded, method, **values):
    """All parts, best first by a method, and what it took to find them."""
    scoring = scoring_options(method, granularity="part", **values)
    found = score_modules(loaded.trainer, loaded.updates, scoring)
    parts = parts_in_order(to_ranking(loaded.updates, found, scoring, {}).modules)
    cost = {"forward_equivalents": found.forward_equivalents, "seconds": found.seconds}
    return [part_name(part.module_name, part.index) for part in parts], cost


def by_modules(loaded):
    """All parts of the best module by elimination, then of the next; and what it took."""
    updates = loaded.updates
    found = score_modules(loaded.trainer, updates, scoring_options("elimination"))
    modules = best_first(found.module_names, found.scores)
    of_module = {update.module.name: len(update.parts.num_parameters) for update in updates}
    order = [part_name(name, index) for name in modules for index in range(of_module[name])]
    return order, {"forward_equivalents": found.forward_equivalents}


def orders(loaded):
    """Label -> all parts, best first, and what it took to find them."""
    updates = loaded.updates
    loaded.trainer.train_dataset = loaded.mask
    is_first = loaded.cell.is_demo or loaded.cell.seed < 2
    for label, values in (METHODS | (OTHER_METHODS if is_first else {})).items():
        yield label, *by_parts(loaded, label.split(",")[0], **values)
    rivals = orders_by_singular_values(updates)
    yield from ((label, order, {}) for label, order in rivals.items())
    yield "modules by elimination", *by_modules(loaded)
    names = list(part_sizes(updates))
    for index in range(NUM_RANDOM_ORDERS):
        order = random.Random(f"{loaded.cell.name} {index}").sample(names, len(names))
        yield f"random {index + 1}", order, {}


def run(cell, folder, shared):
    """All orders of one cell."""
    loaded = cells.load(cell, folder, shared)
    results = []
    for label, order, cost in orders(loaded):
        curve = mask_curve(
            loaded.trainer, loaded.updates, order, loaded.held_out, num_points=NUM_POINTS
        )
        losses = [round(loss, 6) for loss in curve.losses]
        found = {"order": label, "num_parameters": list(curve.num_parameters), "losses": losses}
        results.append(found | cost)
    return {
        "cell": loaded.record["cell"],
        "environment": {"commit": environment()["commit"]},
        "split_sha256": loaded.record["data"]["split_sha256"],
        "results": results,
    }


def verified(path):
    """The curves of a verification as the results of a cell; `path` is DATA-SEED/parts/FILE."""
    found = json.loads(path.read_text(encoding="utf-8"))
    data, _, seed = path.parent.parent.name.rpartition("-")
    curves = {
        "fisher-pruning": found["best_first"],
        **found["rivals"],
        "random": found["random"][0],
    }
    made_by = found["provenance"]
    return {
        "cell": {"data": data, "seed": int(seed)},
        "environment": {"commit": made_by["environment"]["commit"]},
        "split_sha256": made_by["data"]["split_sha256"],
        "results": [
            {"order": order, "num_parameters": curve["num_parameters"]}
            | {"losses": [round(loss, 6) for loss in curve["losses"]]}
            for order, curve in curves.items()
        ],
    }


def main():
    """Run the cells that are left, or collect what is there."""
    parser = cells.parser(__doc__)
    parser.add_argument("--verified", action="store_true")
    given = parser.parse_args()
    wanted = [PartCell(data, seed) for seed in range(5) for data in given.data]
    homes = {cell: given.folder / cell.name / "parts.json" for cell in wanted}
    if given.verified:
        files = sorted(given.folder.glob("*/parts/verification.json"))
        write_json(given.collect, {"cells": [verified(path) for path in files]})
        return
    if given.collect:
        cells.collect(homes.values(), given.collect)
        return
    torch.set_num_threads(1)
    for cell, home in homes.items():
        if not home.exists():
            write_json(home, run(cell, given.folder, given.shared))
            print(cell.name, flush=True)


if __name__ == "__main__":
    main()
