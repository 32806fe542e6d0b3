# SPDX-License-Identifier: Apache-2.0
"""How well scores predict retraining: random subsets of modules, trained from scratch.

    python experiments/subsets.py CELLS_FOLDER --shared SHARED_FOLDER [--collect RECORD]

A good ranking for retraining has sums of scores that order the subsets as their held-out losses do
(the linear datamodelling score of attribution research, Park et al. 2023). Nothing is fitted.
Controls: every module counts the same, and every parameter counts the same. A finished cell is not
run again.
"""

import json
import random
from dataclasses import asdict

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from transformers import TrainerCallback

from keylayers.environment import environment
from keylayers.evaluation.held_out import held_out_loss
from keylayers.files import write_json
from keylayers.scores.methods import methods
from keylayers.scores.score_modules import score_modules
from keylayers.training.run import fine_tune
from keylayers.training.step_scores import StepScores

import cells
from rankings import options_of

NUM_SUBSETS = 40  # of several sizes, with the first seed, and as many of one size with every seed
SIZES = (0.1, 0.2, 0.3, 0.4, 0.5)
ONE_SIZE = 0.2
STEPS = 100
EARLY = (5, 10, 25, 50)  # steps after which the scores of the training itself are read


class Snapshots(TrainerCallback):
    """What `StepScores` has summed after a few steps, and the adapter at that time."""

    def __init__(self, scores):
        self.scores = scores
        self.found, self.adapters = {}, {}

    def on_step_end(self, args, state, control, **kw):
        """Keep them."""
        if state.global_step in EARLY:
            self.found[state.global_step] = [*self.scores.scores.values()]
            adapter = get_peft_model_state_dict(kw["model"])
            self.adapters[state.global_step] = {k: v.clone() for k, v in adapter.items()}


def subsets(cell, names):
    """Random subsets, each in model order; every method is judged by the same ones."""
    sizes = [SIZES[index % len(SIZES)] for index in range(NUM_SUBSETS)] if cell.seed == 0 else []
    draws = {"one size": [ONE_SIZE] * NUM_SUBSETS, "subsets": sizes}
    for kind, wanted in draws.items():
        generator = random.Random(f"{kind} {cell.name}")
        for size in wanted:
            own = set(generator.sample(names, round(size * len(names))))
            yield kind, [name for name in names if name in own]


def trained(cell, folder, shared, names=None, callbacks=()):
    """The cell after training `names` from scratch, and the losses on validation data."""
    loaded = cells.fresh(cell, folder, shared, names, STEPS)
    for callback in callbacks:
        loaded.trainer.add_callback(callback)
    fine_tune(loaded.trainer)
    for callback in callbacks:
        loaded.trainer.remove_callback(callback)
    return loaded, held_out_loss(loaded.trainer, loaded.held_out)


def all_scores(cell, folder, shared):
    """Label -> scores by every method of the fine-tune of all modules, and by its own steps."""
    steps = StepScores()
    snapshots = Snapshots(steps)
    loaded, loss = trained(cell, folder, shared, callbacks=(steps, snapshots))
    updates = loaded.updates
    found = {"step-scores": [*steps.scores.values()]}
    found |= {f"step-scores of {n} steps": own for n, own in snapshots.found.items()}
    loaded.trainer.train_dataset = loaded.mask
    for method in methods():
        if method != "random":
            scored = score_modules(loaded.trainer, updates, options_of(method, cell.seed))
            found[method] = list(scored.scores)
    for num_steps, adapter in snapshots.adapters.items():
        set_peft_model_state_dict(loaded.trainer.model, adapter)
        scored = score_modules(loaded.trainer, updates, options_of("elimination", cell.seed))
        found[f"elimination after {num_steps} steps"] = list(scored.scores)
    modules = [asdict(update.module) for update in updates]
    return modules, found, loss


def run(cell, home, folder, shared):
    """All scores and all subsets of one cell that are not in its file yet."""
    content = {"cell": {"data": cell.data, "seed": cell.seed, "steps": STEPS}, "runs": []}
    if home.exists():
        content = json.loads(home.read_text(encoding="utf-8"))
    else:
        modules, scores, loss = all_scores(cell, folder, shared)
        content["environment"] = {"commit": environment()["commit"]}
        content["num_parameters"] = {module["name"]: sum(module["shape"]) for module in modules}
        content |= {"all_nats": loss, "scores": scores}
    done = [one["modules"] for one in content["runs"]]
    for kind, own in subsets(cell, list(content["num_parameters"])):
        if own not in done:
            loss = trained(cell, folder, shared, own)[1]
            content["runs"].append({"kind": kind, "modules": own, "held_out_loss_nats": loss})
            write_json(home, content)
            print(cell.name, kind, len(own), f"{loss:.4f}", flush=True)


def main():
    """Run the cells that are left, or collect what is there."""
    parser = cells.parser(__doc__)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    wanted = [cells.Cell(data, seed) for seed in given.seeds for data in given.data]
    homes = {cell: given.folder / f"{cell.name}.subsets.json" for cell in wanted}
    if given.collect:
        cells.collect(homes.values(), given.collect)
        return
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    for cell, home in homes.items():
        run(cell, home, given.folder, given.shared)


if __name__ == "__main__":
    main()
