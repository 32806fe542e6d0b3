# SPDX-License-Identifier: Apache-2.0
"""Every method under one measure: mask curves of every cell.

    python experiments/rankings.py CELLS_FOLDER --shared SHARED_FOLDER

For each cell (one fine-tune, see `cells.py`) every method scores the modules, and its order is
measured by the held-out loss with only the best k updates kept. Controls: random orders, best
first; they are the chance level. A finished cell is not run again. `--collect RECORD` writes one
record of all cells.
"""

import argparse
import json
import random
from pathlib import Path

import torch

from keylayers.environment import environment
from keylayers.evaluation.held_out import mask_curve
from keylayers.files import write_json
from keylayers.scores.methods import methods
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options

import cells

NUM_POINTS = 11
NUM_RANDOM_ORDERS = 5
NUM_BATCHES = 8  # for every method that looks at batches, but for our own defaults
PERMUTATIONS = 4
OWN_DEFAULTS = ("elimination", "path")
ON_BOTH = ("elimination", "path", "ila", "leave-one-out")  # mask data: held out, and training data
COMPARED = ("elimination", "path", "ila", "leave-one-out", "update-norm")
KEPT_OF_DATA = ("content_sha256", "split_sha256", "num_train", "num_mask", "num_held_out")


def options_of(method, seed):
    """How a method is run here."""
    own = methods()[method].option_names
    chosen = {"method": method, "mask_seed": seed}
    if "mask_batches" in own and method not in OWN_DEFAULTS:
        chosen["mask_batches"] = NUM_BATCHES
    if "permutations" in own:
        chosen["permutations"] = PERMUTATIONS
    return scoring_options(**chosen)


def curve_of(loaded, order):
    """The curve of one order, for a record."""
    curve = mask_curve(
        loaded.trainer, loaded.updates, order, loaded.held_out, num_points=NUM_POINTS
    )
    return {"area": curve.normalised_area, "losses": list(curve.losses)}


def measured(loaded, names, method, mask_data):
    """One method's scores, curve and cost."""
    loaded.trainer.train_dataset = loaded.mask if mask_data == "held-out" else loaded.train
    options = options_of(method, loaded.cell.seed)
    found = score_modules(loaded.trainer, loaded.updates, options)
    return {
        "method": method,
        "mask_data": mask_data,
        "scores": list(found.scores),
        "forward_equivalents": found.forward_equivalents,
        "seconds": found.seconds,
    } | curve_of(loaded, best_first(names, found.scores))


def best_first(names, scores):
    """Names by falling score, ties in model order."""
    by_name = dict(zip(names, scores, strict=True))
    return sorted(names, key=lambda name: -by_name[name])


def run(cell, folder, shared):
    """All methods on one cell."""
    loaded = cells.load(cell, folder, shared)
    names = [update.module.name for update in loaded.updates]
    results = []
    for index in range(NUM_RANDOM_ORDERS):
        order = random.Random(f"{cell.name} {index}").sample(names, len(names))
        results.append({"method": "random order", "mask_data": None} | curve_of(loaded, order))
    scores = loaded.record["stage_1_path"]
    found = {"method": "stage-1-path", "mask_data": "train", "scores": scores}
    results.append(found | {"forward_equivalents": 0} | curve_of(loaded, best_first(names, scores)))
    for method in methods():
        if method == "random":
            continue
        for mask_data in ("held-out", "train") if method in ON_BOTH else ("held-out",):
            results.append(measured(loaded, names, method, mask_data))
    return {
        "cell": loaded.record["cell"],
        "environment": environment(),
        "stage_1_environment": loaded.record["environment"],
        "data": loaded.record["data"],
        "held_out_loss_nats": loaded.record["held_out_loss_nats"],
        "modules": names,
        "results": results,
    }


def collect(folder, path):
    """One record of all cells: losses of every method, scores of those that are compared."""
    homes = [folder / cell.name / "rankings.json" for cell in cells.ALL]
    found = [json.loads(home.read_text(encoding="utf-8")) for home in homes if home.exists()]
    for cell in found:
        for made_in in (cell["environment"], cell["stage_1_environment"]):
            for key in made_in.keys() - {"commit", "keylayers", "libraries"}:
                del made_in[key]
        cell["data"] = {key: cell["data"][key] for key in KEPT_OF_DATA}
        for result in cell["results"]:
            scores = result.pop("scores", None)
            if result["method"] in COMPARED:
                result["scores"] = [float(f"{score:.5g}") for score in scores]
            result["losses"] = [round(loss, 6) for loss in result["losses"]]
    modules = found[0]["modules"]
    assert all(cell.pop("modules") == modules for cell in found)
    write_json(path, {"modules": modules, "cells": found})


def main():
    """Run the cells that are asked for, or collect what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--collect", type=Path)
    arguments = parser.parse_args()
    if arguments.collect:
        collect(arguments.folder, arguments.collect)
        return
    torch.set_num_threads(1)
    for cell in cells.ALL:
        home = arguments.folder / cell.name / "rankings.json"
        if home.exists():
            continue
        content = run(cell, arguments.folder, arguments.shared)
        write_json(home, content)
        areas = {one["method"]: one["area"] for one in content["results"]}
        print(cell.name, areas, flush=True)


if __name__ == "__main__":
    main()
