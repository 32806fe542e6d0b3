# SPDX-License-Identifier: Apache-2.0
"""Trainings of the arms of a study, each arm at its own learning rate.

On the first seed an arm tries learning rates until its loss on the mask data rises on either side;
the other seeds take the best one. Losses that are compared are those of the held-out data. A
finished training is not run again.
"""

import json

import torch

from keylayers.environment import environment
from keylayers.evaluation.held_out import held_out_loss
from keylayers.files import write_json
from keylayers.training.run import fine_tune

import cells


class Sweep:
    """The trainings of one cell; `first` is seed 0's, on which rates are tried."""

    def __init__(self, cell, folder, shared, file):
        self.cell, self.folder, self.shared, self.first = cell, folder, shared, None
        self.path = folder / cell.name / file
        self.content = {"cell": {"data": cell.data, "seed": cell.seed}, "results": []}
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))

    def load(self):
        """The fine-tuned cell."""
        loaded = cells.load(self.cell, self.folder, self.shared)
        self.content["full_nats"] = loaded.record["held_out_loss_nats"]["tuned"]
        return loaded

    def rates(self, arm):
        """The learning rates that an arm has still to train at, in multiples of the default."""
        while (rate := self._next(arm)) is not None:
            yield rate

    def _next(self, arm):
        tried = self._tried(arm)
        if self.first is None:
            best = min(tried, key=tried.get, default=1.0)
            rates = (best, 2 * best, best / 2)
        else:
            of_first = self.first._tried(arm)
            assert of_first, f"{arm} of seed 0 must be trained first"
            rates = [min(of_first, key=of_first.get)]
        return next((rate for rate in rates if rate not in tried), None)

    def _tried(self, arm):
        """Learning rate -> loss on the mask data of an arm's finished trainings."""
        own = [one for one in self.content["results"] if arm.items() <= one.items()]
        return {one["rate"]: one["mask_loss_nats"] for one in own}

    def train(self, trainer, loaded, arm, rate, **more):
        """Train one arm at one rate and write it down."""
        trainer.args.learning_rate *= rate  # before the optimiser is made
        before = held_out_loss(trainer, loaded.held_out)
        fine_tune(trainer)
        found = {
            "before_nats": before,
            "mask_loss_nats": held_out_loss(trainer, loaded.mask),
            "held_out_loss_nats": held_out_loss(trainer, loaded.held_out),
        }
        self.content["results"].append(arm | {"rate": rate} | more | found)
        self.content["environment"] = {"commit": environment()["commit"]}
        write_json(self.path, self.content)
        print(self.cell.name, *arm.values(), rate, f"{found['held_out_loss_nats']:.4f}", flush=True)


def main(description, cell_type, file, run):
    """Run what is left of every cell, or collect what is there."""
    parser = cells.parser(description)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    if given.collect:
        cells.collect(sorted(given.folder.glob(f"*/{file}")), given.collect)
        return
    torch.set_num_threads(1)
    for data in given.data:
        for seed in given.seeds:
            first, own = (
                Sweep(cell_type(data, one), given.folder, given.shared, file) for one in (0, seed)
            )
            own.first = first if seed else None
            run(own)
