# SPDX-License-Identifier: Apache-2.0
"""Planted truth: only known modules carry a useful update; do they come out on top?

    python experiments/planted.py --output record.json

Each trial draws a style of the demo's answers, three modules, and what the others carry: nothing,
or noise. The three are fine-tuned (LoRA, the others' matrices fixed at zero); noise is a random B
of the same Frobenius norm as theirs on average. A trial succeeds when the three have the three
highest scores; chance is 1 in 27,720. The useful update must be useful: draws in which one of the
three, alone, lowers the held-out loss by less than a tenth of what all three do are drawn again,
and counted.
"""

import argparse
import random
import tempfile
from pathlib import Path

import cells
import torch

from keylayers.environment import environment
from keylayers.evaluation.mask_curve import subset_losses
from keylayers.files import write_json
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options
from keylayers.training.run import fine_tune, make_trainer
from keylayers.updates import adapter_updates

NUM_PLANTED = 3
STEPS = 40


def planted(cell, folder, names):
    """The cell with a useful update on `names` and zero elsewhere."""
    loaded = cells.fresh(cell, folder, None)
    model = loaded.trainer.model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and any(f".{one}." in name for one in names))
    trainer = make_trainer(
        model, loaded.trainer.processing_class, loaded.train, cell.training(), num_steps=STEPS
    )
    fine_tune(trainer)
    return loaded, trainer


def add_noise(updates, names, generator):
    """Random B matrices with the mean norm of the planted ones."""
    weights = {one.module.name: one.layer.lora_B[one.adapter].weight for one in updates}
    size = sum(float(weights[name].norm()) for name in names) / len(names)
    with torch.no_grad():
        for name, weight in weights.items():
            if name not in names:
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(noise / noise.norm() * size)


def trial(index, folder):
    """One trial's record, or None if the drawn modules did not learn anything of use."""
    draw = random.Random(f"planted {index}")
    cell = cells.Cell(draw.choice(cells.DEMO), index)
    every = [one.module.name for one in cells.fresh(cell, folder, None).updates]
    names = draw.sample(every, NUM_PLANTED)
    has_noise = index % 2 == 1
    loaded, trainer = planted(cell, folder, names)
    updates = adapter_updates(trainer.model)
    alone = [[name] for name in names]
    losses = [
        one.mean for one in subset_losses(trainer, updates, [[], names, *alone], loaded.held_out)
    ]
    gains = [losses[0] - loss for loss in losses[1:]]
    if min(gains[1:]) < gains[0] / 10:
        return None
    if has_noise:
        add_noise(updates, names, torch.Generator().manual_seed(index))
    trainer.train_dataset = loaded.mask
    found = score_modules(trainer, updates, scoring_options(mask_seed=index))
    ordered = sorted(zip(found.module_names, found.scores, strict=True), key=lambda one: -one[1])
    return {
        "index": index,
        "data": cell.data,
        "others": "noise" if has_noise else "nothing",
        "planted": names,
        "gain_nats": gains[0],
        "top": [name for name, _ in ordered[:NUM_PLANTED]],
        "is_found": {name for name, _ in ordered[:NUM_PLANTED]} == set(names),
    }


def main():
    """Run until enough trials count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    trials, index, num_useless = [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        while len(trials) < arguments.trials:
            found = trial(index, Path(folder))
            index += 1
            if found is None:
                num_useless += 1
                continue
            trials.append(found)
            print(len(trials), found["others"], found["is_found"], flush=True)
    num_found = sum(one["is_found"] for one in trials)
    content = {"environment": environment(), "num_found": num_found, "num_useless": num_useless}
    write_json(arguments.output, content | {"trials": trials})
    print(f"{num_found} of {len(trials)} found; {num_useless} draws had no useful update")


if __name__ == "__main__":
    main()
