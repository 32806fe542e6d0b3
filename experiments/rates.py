# SPDX-License-Identifier: Apache-2.0
"""Do learning rates by module help? All modules are trained, the important ones faster.

    python experiments/rates.py CELLS_FOLDER --shared SHARED_FOLDER [--collect RECORD]

A module's rate is the arm's own times a factor that falls evenly (on a logarithmic scale) from the
first module of an order to the last, with a geometric mean of 1. Controls: the same rate
everywhere, the order reversed, random orders. `sweeps.py` tells how the arm's own rate is chosen.
"""

import random

import numpy as np
import sweeps

from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options

import cells
from rankings import best_first

SPREADS = (4.0, 16.0)  # the first module's factor, in multiples of the last one's
NUM_RANDOM_ORDERS = 2
STEPS = 0.5  # of stage 1's


def orders(loaded):
    """Label -> all modules, best first."""
    loaded.trainer.train_dataset = loaded.mask
    own = {}
    for method in ("elimination", "gradient-path"):
        found = score_modules(loaded.trainer, loaded.updates, scoring_options(method))
        own[method] = best_first(found.module_names, found.scores)
    own["elimination reversed"] = own["elimination"][::-1]
    names = [update.module.name for update in loaded.updates]
    for draw in range(NUM_RANDOM_ORDERS):
        generator = random.Random(f"{loaded.cell.name} {draw}")
        own[f"random {draw + 1}"] = generator.sample(names, len(names))
    return own


def run(sweep):
    """What is left of one cell."""
    loaded = sweep.load()
    own = orders(loaded)
    arms = [(label, spread, order) for label, order in own.items() for spread in SPREADS]
    for label, spread, order in [("the same rate", 1.0, own["elimination"]), *arms]:
        arm = {"order": label, "spread": spread}
        for rate in sweep.rates(arm):
            steps = round(STEPS * sweep.cell.steps)
            fresh = cells.fresh(sweep.cell, sweep.folder, sweep.shared, num_steps=steps)
            factors = np.geomspace(spread**0.5, spread**-0.5, len(order))
            by_module(fresh, rate, dict(zip(order, factors.tolist(), strict=True)))
            sweep.train(fresh.trainer, loaded, arm, rate)


def by_module(fresh, rate, factors):
    """Give the trainer an optimiser with a learning rate for each module."""
    trainer = fresh.trainer
    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    options["lr"] = rate * trainer.args.learning_rate
    trainer.optimizer = kind(
        [
            {
                "params": list(weights_of(update)),
                "lr": options["lr"] * factors[update.module.name],
                "weight_decay": trainer.args.weight_decay,
            }
            for update in fresh.updates
        ],
        **options,
    )


def weights_of(update):
    """The LoRA matrices of a module."""
    return (part[update.adapter].weight for part in (update.layer.lora_A, update.layer.lora_B))


if __name__ == "__main__":
    sweeps.main(__doc__, cells.Cell, "rates.json", run)
