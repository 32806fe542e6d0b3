# SPDX-License-Identifier: Apache-2.0
"""What training adds to small adapters: cut and healed, or trained from scratch with those ranks.

    python experiments/healing.py CELLS_FOLDER --shared SHARED_FOLDER [--collect RECORD]

Takes the cells of `parts.py`. Every order of the parts buys the same share of the parameters. The
cut adapter is measured, then trained for a few steps (healed); new LoRA matrices of the ranks that
the order buys are trained from scratch (retrained). The whole adapter is the control of both.
`sweeps.py` tells how learning rates are chosen.
"""

import random
import tempfile
from dataclasses import replace
from pathlib import Path

import sweeps
from parts import PartCell, by_modules, by_parts

from keylayers.apply.prune import prune_adapter
from keylayers.evaluation.verify import orders_by_singular_values
from keylayers.gates import part_name, part_sizes
from keylayers.model.loading import load_adapter, load_model
from keylayers.model.options import ModelOptions
from keylayers.ranking.budget import Parameters
from keylayers.ranking.parts import select_parts
from keylayers.ranking.ranked_module import RankedModule
from keylayers.training.run import make_trainer
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


def run(sweep):
    """What is left of one cell."""
    loaded = sweep.load()
    own = orders(loaded)
    with tempfile.TemporaryDirectory() as folder:
        loaded.trainer.model.save_pretrained(folder)
        for kind, share in SHARES.items():
            arms = [(label, order, share) for label, order in own.items()]
            for label, order, size in [*arms, ("all", own["uniform rank"], 1.0)]:
                cut = selected(loaded.updates, order, size)
                arm = {"kind": kind, "order": label, "share": size}
                more = {"num_modules": len(cut.names), "num_parameters": cut.num_parameters}
                for rate in sweep.rates(arm):
                    trainer = trainer_of(kind, sweep, loaded, cut, folder)
                    sweep.train(trainer, loaded, arm, rate, **more)


def trainer_of(kind, sweep, loaded, cut, adapter):
    """A trainer of the cut adapter, or of new matrices of its ranks."""
    steps = round(STEPS[kind] * sweep.cell.steps)
    if kind == "retrained":
        return cells.fresh(sweep.cell, sweep.folder, sweep.shared, cut.ranks, steps).trainer
    pruned = {update.module.name for update in loaded.updates} - set(cut.names)
    with tempfile.TemporaryDirectory() as folder:
        prune_adapter(adapter, Path(folder), loaded.trainer.model, pruned, cut)
        path = loaded.trainer.model.config._name_or_path
        base = load_model(ModelOptions(model=path, dtype="float32"))
        model = load_adapter(base, folder)
    for layer in tuner_layers(model).values():
        for weight in own_parameters(layer):
            weight.requires_grad_(True)
    tokenizer, options = loaded.trainer.processing_class, sweep.cell.training()
    return make_trainer(model, tokenizer, loaded.train, options, num_steps=steps)


if __name__ == "__main__":
    sweeps.main(__doc__, PartCell, "healing.json", run)
