# SPDX-License-Identifier: Apache-2.0
"""Which optimiser and initial score rank better? Published relaxation, by the mask curve.

    python experiments/mask_optimizer.py --model MODEL --data DATA --output record.json
    python experiments/mask_optimizer.py --demo polite --output record.json

Fine-tunes once per seed, learns scores in each setting on that one update, and measures each
ranking's normalised area under the mask curve on held-out data (lower is better), beside random
orders.
"""

import argparse
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from keylayers.data.options import DataOptions
from keylayers.data.prepare import prepare
from keylayers.environment import environment
from keylayers.evaluation.loss import held_out_loss
from keylayers.evaluation.mask_curve import mask_curve
from keylayers.files import write_json
from keylayers.model.loading import load_model, load_tokenizer, max_positions
from keylayers.model.modules import map_modules
from keylayers.model.options import ModelOptions
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options
from keylayers.training.options import TrainingOptions
from keylayers.training.run import fine_tune, make_trainer, new_adapter
from keylayers.updates import adapter_updates

NUM_POINTS = 15
NUM_RANDOM_ORDERS = 5
SETTINGS = [
    scoring_options(
        method="ila", mask_optimizer=optimizer, mask_learning_rate=rate, initial_score=score
    )
    for optimizer, rates in (("sgd", (3.0, 10.0, 30.0)), ("adam", (0.01, 0.05)))
    for rate in rates
    for score in (4.0, 2.0, 1.0)
]


def score(trainer, updates, setting, seed):
    """The scores of one setting of the published relaxation."""
    return score_modules(trainer, updates, replace(setting, mask_seed=seed))


def describe(setting):
    """How a record names a setting."""
    return {
        "optimizer": setting.options.mask_optimizer,
        "learning_rate": setting.options.mask_learning_rate,
        "initial_score": setting.options.initial_score,
    }


@dataclass(frozen=True)
class Study:
    """What is compared: settings, how each scores modules, and how a record names it."""

    settings: list
    score: Callable
    describe: Callable


def run(arguments, seed, study):
    """One fine-tune, and the area of every setting and of random orders."""
    model_options = ModelOptions(model=arguments.model)
    tokenizer, model = load_tokenizer(model_options), load_model(model_options)
    data_options = DataOptions(
        data=arguments.data, max_length=arguments.max_length, held_out=arguments.held_out
    )
    data = prepare(data_options, tokenizer, max_positions(model))
    training = TrainingOptions(
        batch_size=arguments.batch_size, learning_rate=arguments.learning_rate, seed=seed
    )
    tuned = new_adapter(model, [info.name for info in map_modules(model)], training, num_steps=1)
    trainer = make_trainer(tuned, tokenizer, data.train, training, num_steps=arguments.steps)
    base_loss = held_out_loss(trainer, data.held_out)
    fine_tune(trainer)
    updates = adapter_updates(tuned)
    names = [update.module.name for update in updates]
    record = {
        "seed": seed,
        "held_out_loss_nats": {"base": base_loss, "tuned": held_out_loss(trainer, data.held_out)},
        "random": [],
        "settings": [],
    }
    print(record["held_out_loss_nats"], flush=True)
    for index in range(NUM_RANDOM_ORDERS):
        order = random.Random(index).sample(names, len(names))
        curve = mask_curve(trainer, updates, order, data.held_out, num_points=NUM_POINTS)
        record["random"].append(curve.normalised_area)
    print("random", [round(area, 3) for area in record["random"]], flush=True)
    for setting in study.settings:
        learned = study.score(trainer, updates, setting, seed)
        by_score = dict(zip(names, learned.scores, strict=True))
        order = sorted(names, key=lambda name: -by_score[name])
        curve = mask_curve(trainer, updates, order, data.held_out, num_points=NUM_POINTS)
        result = study.describe(setting) | {
            "area": curve.normalised_area,
            "seconds": learned.seconds,
        }
        record["settings"].append(result)
        print(result, flush=True)
    return record, data.record()


def demo_data(style, folder):
    """The demo's data of one style as a file, and the demo's model."""
    from keylayers.demo.run import BASE, write_data

    path = Path(folder) / f"{style}.jsonl"
    write_data(path, style)
    return str(path), str(BASE)


def main(study):
    """Run every seed and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--demo", choices=["polite", "list", "terse"])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--held-out", type=float, default=64)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        name = arguments.data
        if arguments.demo:
            arguments.data, arguments.model = demo_data(arguments.demo, folder)
            name = f"demo {arguments.demo}"
        runs = []
        for seed in range(arguments.seeds):
            record, data = run(arguments, seed, study)
            runs.append(record)
    options = {key: value for key, value in vars(arguments).items() if key != "output"}
    options["data"], options["model"] = Path(str(name)).name, Path(arguments.model).name
    content = {"environment": environment(), "options": options, "runs": runs}
    content["content_sha256"] = data["content_sha256"]
    write_json(arguments.output, content)
    areas = [area for one in runs for area in one["random"]]
    print(f"random {statistics.mean(areas):.3f} ± {statistics.stdev(areas):.3f}")


if __name__ == "__main__":
    main(Study(SETTINGS, score, describe))
