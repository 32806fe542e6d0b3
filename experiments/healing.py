# SPDX-License-Identifier: Apache-2.0
"""What training adds to small adapters: cut and healed, or trained from scratch with those ranks.

    python experiments/healing.py CELLS_FOLDER --shared SHARED_FOLDER [--collect RECORD]

Takes the cells of `parts.py`. Every order of the parts buys the same share of the parameters. The
cut adapter is measured, then trained for a few steps (healed); new LoRA matrices of the ranks that
the order buys are trained from scratch (retrained). The whole adapter is the control of both. On
the first seed each arm tries learning rates until its loss on the mask data rises on either side;
the other seeds take the best one. Losses are those of the held-out data. A finished training is
not run again.
"""

import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from parts import PartCell, by_modules, by_parts

from keylayers.apply.prune import prune_adapter
from keylayers.environment import environment
from keylayers.evaluation.held_out import held_out_loss
from keylayers.evaluation.verify import orders_by_singular_values
from keylayers.files import write_json
from keylayers.gates import part_name, part_sizes
from keylayers.model.loading import load_adapter, load_model
from keylayers.model.options import ModelOptions
from keylayers.ranking.budget import Parameters
from keylayers.ranking.parts import select_parts
from keylayers.ranking.ranked_module import RankedModule
from keylayers.training.run import fine_tune, make_trainer
from keylayers.updates.adapter import own_parameters, tuner_layers

import cells

SHARES = {"healed": 0.05, "retrained": 0.1}  # of the adapter's parameters
STEPS = {"healed": 0.25, "retrained": 0.5}  # of stage 1's


def orders(loaded):
    """Label -> all parts, best first."""
    loaded.trainer.train_dataset = loaded.mask
    ours, _ = by_parts(loaded, "fisher-pruning")
    modules, _ = by_modules(loaded)
    names = list(part_sizes(loaded.updates))
    shuffled = random.Random(f"healing {loaded.cell.name}").sample(names, len(names))
    own = {"fisher-pruning": ours, "modules by elimination": modules, "random": shuffled}
    return own | orders_by_singular_values(loaded.updates)


def selected(updates, order, share):
    """The first parts of an order that fit into a share of the parameters."""
    place = {name: index for index, name in enumerate(order)}
    modules = []
    for update in updates:
        sizes, name = update.parts.num_parameters, update.module.name
        scores = [
            (len(order) - place[part_name(name, index)]) * size for index, size in enumerate(sizes)
        ]
        ranked = RankedModule.of(update.module, sum(scores))
        modules.append(replace(ranked, part_scores=tuple(scores), part_parameters=tuple(sizes)))
    return select_parts(modules, Parameters(share))


class Arms:
    """The trainings of one cell; `first` has those of the seed on which rates are tried."""

    def __init__(self, cell, given, first):
        self.cell, self.given, self.first = cell, given, first or self
        self.path = given.folder / cell.name / "healing.json"
        self.content = {"cell": {"data": cell.data, "seed": cell.seed}, "results": []}
        if self.path.exists():
            self.content = json.loads(self.path.read_text(encoding="utf-8"))

    def run(self):
        """What is left."""
        loaded = cells.load(self.cell, self.given.folder, self.given.shared)
        own = orders(loaded)
        with tempfile.TemporaryDirectory() as folder:
            loaded.trainer.model.save_pretrained(folder)
            for kind, share in SHARES.items():
                arms = [(label, order, share) for label, order in own.items()]
                for label, order, size in [*arms, ("all", own["uniform rank"], 1.0)]:
                    cut = selected(loaded.updates, order, size)
                    arm = {"kind": kind, "order": label, "share": size}
                    while (rate := self.next_rate(arm)) is not None:
                        trainer = self.trainer(kind, cut, folder, loaded, rate)
                        self.train(trainer, loaded, cut, arm | {"rate": rate})

    def next_rate(self, arm):
        """The learning rate to try next, in multiples of the default; None if nothing is left."""
        tried = self.tried(arm)
        if self.first is self:
            best = min(tried, key=tried.get, default=1.0)
            rates = (best, 2 * best, best / 2)
        else:
            of_first = self.first.tried(arm)
            rates = [min(of_first, key=of_first.get)]
        return next((rate for rate in rates if rate not in tried), None)

    def tried(self, arm):
        """Learning rate -> loss on the mask data, of an arm's finished trainings."""
        own = [one for one in self.content["results"] if arm.items() <= one.items()]
        return {one["rate"]: one["mask_loss_nats"] for one in own}

    def trainer(self, kind, cut, adapter, loaded, rate):
        """A trainer of the cut adapter, or of new matrices of its ranks."""
        steps = round(STEPS[kind] * self.cell.steps)
        if kind == "retrained":
            folder, shared = self.given.folder, self.given.shared
            trainer = cells.fresh(self.cell, folder, shared, cut.ranks, steps).trainer
        else:
            pruned = {update.module.name for update in loaded.updates} - set(cut.names)
            with tempfile.TemporaryDirectory() as folder:
                prune_adapter(adapter, Path(folder), loaded.trainer.model, pruned, cut)
                path = loaded.trainer.model.config._name_or_path
                base = load_model(ModelOptions(model=path, dtype="float32"))
                model = load_adapter(base, folder)
            for layer in tuner_layers(model).values():
                for weight in own_parameters(layer):
                    weight.requires_grad_(True)
            tokenizer, options = loaded.trainer.processing_class, self.cell.training()
            trainer = make_trainer(model, tokenizer, loaded.train, options, num_steps=steps)
        trainer.args.learning_rate *= rate  # before the optimiser is made
        return trainer

    def train(self, trainer, loaded, cut, arm):
        """Train one arm and write it down."""
        before = held_out_loss(trainer, loaded.held_out)
        fine_tune(trainer)
        found = {
            "num_modules": len(cut.names),
            "num_parameters": cut.num_parameters,
            "before_nats": before,
            "mask_loss_nats": held_out_loss(trainer, loaded.mask),
            "held_out_loss_nats": held_out_loss(trainer, loaded.held_out),
        }
        self.content["results"].append(arm | found)
        self.content["environment"] = {"commit": environment()["commit"]}
        self.content["full_nats"] = loaded.record["held_out_loss_nats"]["tuned"]
        write_json(self.path, self.content)
        print(self.cell.name, *arm.values(), f"{found['held_out_loss_nats']:.4f}", flush=True)


def main():
    """Run what is left, or collect what is there."""
    parser = cells.parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    if given.collect:
        cells.collect(sorted(given.folder.glob("*/healing.json")), given.collect)
        return
    torch.set_num_threads(1)
    for data in given.data:
        first = None
        for seed in given.seeds:
            arms = Arms(PartCell(data, seed), given, first)
            first = arms.first
            arms.run()


if __name__ == "__main__":
    main()
