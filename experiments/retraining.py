# SPDX-License-Identifier: Apache-2.0
"""Training from scratch on what a ranking selects: the paper's claims at the size we have.

    python experiments/retraining.py CELLS_FOLDER --shared SHARED_FOLDER

Needs the rankings of `rankings.py`. For each cell every set of modules is trained from fresh LoRA
matrices with the same data, order of batches and number of steps: paired by seed. Two losses: on
the held-out examples (what was learned), and on text that the base model wrote itself (what was
forgotten; its rise is an estimate of the divergence from the base model). Results are written one
by one and never run again.
"""

import json
import random

import torch
from datasets import Dataset

from keylayers.environment import environment
from keylayers.evaluation.held_out import held_out_loss
from keylayers.files import write_json
from keylayers.ranking.budget import Time
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from keylayers.training.run import fine_tune

import cells
from rankings import best_first

STEPS = 100
BUDGETS = (0.1, 0.2, 0.3)
FROZEN = 0.25
FROZEN_BY = ("elimination", "ila", "first", "last", "random")
NUM_OWN_TEXTS, OWN_TEXT_TOKENS = 48, 64


def selections(cell, folder, budgets, methods):
    """Label and budget -> modules to train: all, the best, all but the worst, and controls."""
    found = json.loads((folder / cell.name / "rankings.json").read_text(encoding="utf-8"))
    names = found["modules"]
    orders = {
        one["method"]: best_first(names, one["scores"])
        for one in found["results"]
        if "scores" in one and one["mask_data"] in (None, "held-out")
    }
    generator = random.Random(f"retraining {cell.name}")
    orders["random"] = generator.sample(names, len(names))
    chosen = {("all", 1.0): names}
    for method in (*methods, "random"):
        order = orders[method]
        if method in FROZEN_BY:
            chosen[(f"freeze worst, {method}", 1 - FROZEN)] = order[: len(order) - len(order) // 4]
        for budget in budgets:
            chosen[(method, budget)] = order[: round(budget * len(order))]
    return {key: [name for name in names if name in set(part)] for key, part in chosen.items()}


def within_prices(cell, folder, shared, prices):
    """Label and price -> what the default's scores buy for so much of a step's cost."""
    found = json.loads((folder / cell.name / "rankings.json").read_text(encoding="utf-8"))
    (scores,) = (
        one["scores"]
        for one in found["results"]
        if one["method"] == "elimination" and one["mask_data"] == "held-out"
    )
    loaded = cells.fresh(cell, folder, shared)
    modules = tuple(
        RankedModule.of(update.module, score)
        for update, score in zip(loaded.updates, scores, strict=True)
    )
    head = loaded.trainer.model.get_output_embeddings().weight.numel()
    made_by = {
        "options": {"lora_rank": cell.training().lora_rank},
        "model": {"num_head_parameters": head},
    }
    ranking = Ranking(modules, "elimination", provenance=made_by)
    names = {price: set(ranking.select(Time(price)).names) for price in prices}
    return {
        ("elimination within a price", price): [name for name in found["modules"] if name in taken]
        for price, taken in names.items()
    }


def own_text(loaded):
    """Text that the base model writes: LoRA's update is zero before training."""
    model = loaded.trainer.model
    tokenizer = loaded.trainer.processing_class
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else 1
    torch.manual_seed(0)
    start = torch.full((NUM_OWN_TEXTS, 1), first)
    model.eval()
    rows = model.generate(
        input_ids=start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=0,
        max_new_tokens=OWN_TEXT_TOKENS - 1,
        min_new_tokens=OWN_TEXT_TOKENS - 1,
    ).tolist()
    model.train()
    return Dataset.from_dict({"input_ids": rows, "labels": rows})


def train(cell, folder, shared, names, texts):
    """Held-out and own-text loss after training `names` from scratch."""
    loaded = cells.fresh(cell, folder, shared, names, STEPS)
    texts, trainer = texts or own_text(loaded), loaded.trainer
    before = held_out_loss(trainer, texts)
    result = fine_tune(trainer)
    return texts, {
        "num_modules": len(names),
        "num_trained_parameters": trainer.get_num_trainable_parameters(),
        "held_out_loss_nats": held_out_loss(trainer, loaded.held_out),
        "own_text_rise_nats": held_out_loss(trainer, texts) - before,
        "seconds": result.seconds,
    }


def run(cell, given):
    """Every selection of one cell that is not in its file yet."""
    folder, shared = given.folder, given.shared
    path = folder / cell.name / "retraining.json"
    content = {"environment": environment(), "steps": STEPS, "cell": cell.name, "results": []}
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
    finished = {(one["label"], one["budget"]) for one in content["results"]}
    texts = None
    wanted = selections(cell, folder, given.budgets, given.methods)
    wanted |= within_prices(cell, folder, shared, given.prices) if given.prices else {}
    for (label, budget), names in wanted.items():
        if (label, budget) in finished:
            continue
        texts, found = train(cell, folder, shared, names, texts)
        content["results"].append({"label": label, "budget": budget} | found)
        write_json(path, content)
        print(cell.name, label, budget, f"{found['held_out_loss_nats']:.4f}", flush=True)


def main():
    """Run the cells that are asked for, or collect what is there."""
    parser = cells.parser(__doc__)
    parser.set_defaults(data=["list", "alpaca"])
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--methods", nargs="+", default=["elimination", "ila", "first", "last"])
    parser.add_argument("--prices", nargs="*", type=float, default=[])
    arguments = parser.parse_args()
    wanted = [cell for cell in cells.ALL if cell.data in arguments.data]
    if arguments.collect:
        paths = [arguments.folder / cell.name / "retraining.json" for cell in cells.ALL]
        cells.collect(paths, arguments.collect)
        return
    torch.set_num_threads(1)
    for cell in wanted:
        run(cell, arguments)


if __name__ == "__main__":
    main()
