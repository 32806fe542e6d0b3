# SPDX-License-Identifier: Apache-2.0
"""Does a ranking depend on how long stage 1 ran, and on the initial score of the published method?

    python experiments/checkpoints.py CELLS_FOLDER --shared SHARED_FOLDER --output record.json

Ranks the same fine-tunes at 1, 25, 50 and 100 % of stage 1 (default method), and at the end with
the published method from initial scores of 4, 2 and 1. The record holds the scores.
"""

import argparse
from pathlib import Path

import cells
import torch

from keylayers.environment import environment
from keylayers.files import write_json
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options

INITIAL_SCORES = (4.0, 2.0, 1.0)  # those of the paper (from memory of its text)


def run(cell, folder, shared):
    """Scores of one cell in every setting."""
    record = {"cell": cell.name, "data": cell.data, "seed": cell.seed, "settings": []}
    for part in (*cells.CHECKPOINT_FRACTIONS, None):
        loaded = cells.load(cell, folder, shared, part)
        loaded.trainer.train_dataset = loaded.mask
        settings = {f"at {part or 1.0:g} of stage 1": scoring_options(mask_seed=cell.seed)}
        if part is None:
            settings |= {
                f"ila from {score:g}": scoring_options(
                    method="ila", initial_score=score, mask_seed=cell.seed
                )
                for score in INITIAL_SCORES
            }
        for label, options in settings.items():
            found = score_modules(loaded.trainer, loaded.updates, options)
            scores = [float(f"{score:.5g}") for score in found.scores]
            record["settings"].append({"label": label, "scores": scores})
    return record


def main():
    """Run the cells that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--data", nargs="+", default=["terse", "alpaca"])
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    records = []
    for cell in cells.ALL:
        if cell.data in arguments.data:
            records.append(run(cell, arguments.folder, arguments.shared))
            print(cell.name, flush=True)
    write_json(arguments.output, {"environment": environment(), "cells": records})


if __name__ == "__main__":
    main()
