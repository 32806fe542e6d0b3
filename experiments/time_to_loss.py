# SPDX-License-Identifier: Apache-2.0
"""Time until a selection has learned as much as LoRA on all modules did: the point of a price.

    python experiments/time_to_loss.py CELLS_FOLDER --shared SHARED_FOLDER --output record.json

Needs the rankings of `rankings.py`. For each cell all modules are trained for three epochs, from
fresh LoRA matrices; then what a price buys is trained, with the frozen blocks kept from epoch to
epoch, until its held-out loss is as low, for twice the steps at most. Paired by seed: the same
data, order of batches and first values. Seconds are those of the steps alone, without evaluations.
"""

import argparse
import tempfile
import time
from pathlib import Path

import cells
import torch
from retraining import within_prices
from transformers import TrainerCallback

from keylayers.environment import environment
from keylayers.evaluation.loss import held_out_loss
from keylayers.files import write_json
from keylayers.training.prefix_cache import PrefixCache
from keylayers.training.run import fine_tune, make_trainer

NUM_EPOCHS = 3
MOST = 2.0  # times the steps of the reference
PRICES = (0.6, 0.7, 0.8, 0.9)
EVERY = 0.1  # of the reference's steps


class UntilAsLow(TrainerCallback):
    """Seconds of each step; stops when the held-out loss is as low as `goal`."""

    def __init__(self, held_out, goal, every):
        self.held_out, self.goal, self.every = held_out, goal, every
        self.seconds, self.losses = [], {}

    def on_step_begin(self, args, state, control, **kwargs):
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        """Stop the clock, then look at the held-out loss."""
        self.seconds.append(time.perf_counter() - self.start)
        if self.goal is not None and state.global_step % self.every == 0:
            loss = held_out_loss(self.trainer, self.held_out)
            self.losses[state.global_step] = loss
            control.should_training_stop = loss <= self.goal


def trained(cell, folder, shared, names, goal=None, num_steps=None):
    """Held-out loss, steps and seconds of a training of `names`."""
    loaded = cells.fresh(cell, folder, shared, names)
    options = cell.training()
    epoch = -(-len(loaded.train) // options.batch_size)
    steps = num_steps or NUM_EPOCHS * epoch
    trainer = make_trainer(
        loaded.trainer.model,
        loaded.trainer.processing_class,
        loaded.train,
        options,
        num_steps=steps if goal is None else int(MOST * steps),
    )
    watch = UntilAsLow(loaded.held_out, goal, max(1, round(EVERY * steps)))
    watch.trainer = trainer
    trainer.add_callback(watch)
    cache = None
    if goal is not None and lowest_block(loaded, names) > 0:
        cache = PrefixCache(0.5, Path(tempfile.gettempdir()))
    fine_tune(trainer, cache=cache)
    loss = held_out_loss(trainer, loaded.held_out)
    return {
        "num_modules": len(names),
        "num_frozen_blocks": 0 if cache is None else cache.num_blocks,
        "num_steps": len(watch.seconds),
        "steps_of_reference": steps,
        "seconds": sum(watch.seconds),
        "held_out_loss_nats": loss,
        "losses": watch.losses,
        "is_as_low": goal is None or loss <= goal,
    }


def lowest_block(loaded, names):
    """The lowest block that is trained."""
    blocks = {one.module.name: one.module.block_index for one in loaded.updates}
    return min(blocks[name] for name in names)


def main():
    """Every cell, into one record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--data", nargs="+", default=["terse", "list", "alpaca"])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(5)))
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record = {"environment": environment(), "epochs": NUM_EPOCHS, "most": MOST, "cells": []}
    for cell in cells.ALL:
        if cell.data not in arguments.data or cell.seed not in arguments.seeds:
            continue
        sets = within_prices(cell, arguments.folder, arguments.shared, PRICES)
        every = list(cells.fresh(cell, arguments.folder, arguments.shared).updates)
        names = [one.module.name for one in every]
        whole = trained(cell, arguments.folder, arguments.shared, names)
        results = {"all": whole}
        for (_, price), chosen in sets.items():
            goal = whole["held_out_loss_nats"]
            found = trained(cell, arguments.folder, arguments.shared, chosen, goal)
            found["throughput"] = whole["seconds"] / found["seconds"]
            results[f"{price:g}x-time"] = found
            print(
                cell.name, price, found["num_modules"], found["num_frozen_blocks"],
                f"{found['num_steps']}/{found['steps_of_reference']}", found["is_as_low"],
                f"{found['held_out_loss_nats']:.4f} {goal:.4f} x {found['throughput']:.2f}",
                flush=True,
            )  # fmt: skip
        record["cells"].append({"cell": cell.name, "results": results})
        write_json(arguments.output, record)


if __name__ == "__main__":
    main()
