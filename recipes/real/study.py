# SPDX-License-Identifier: Apache-2.0
"""What selecting modules is worth on a real model: trainings from scratch on chosen modules.

    python recipes/real/study.py RESULTS_FOLDER --model MODEL --data DATA_FOLDER [--collect RECORD]

One result per line of RESULTS_FOLDER/DATA-SEED.jsonl, written as it comes; a finished training is
not run again. Trainings of one seed share data, order of the batches and number of steps. The
first, on all modules, is also what the rankings are made of. On the first seed every arm tries
learning rates until its loss on new examples rises; other seeds take the best one. What
is reported is measured on other examples: the official test set, and data of another task
(forgetting). `README.md` explains the arms.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import torch
from arms import TASKS, TIERS, Arm, next_rate
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from keylayers.data.chat import IGNORED, encode_all
from keylayers.data.options import DataOptions
from keylayers.data.prepare import prepare
from keylayers.data.reading import read_conversations
from keylayers.data.templates import resolve_template
from keylayers.environment import environment
from keylayers.evaluation.held_out import held_out_loss, masked_losses
from keylayers.evaluation.texts import example_losses, predictions
from keylayers.files import write_json
from keylayers.model.loading import load_model, load_tokenizer
from keylayers.model.modules import ModuleInfo, map_modules
from keylayers.model.options import ModelOptions
from keylayers.ranking.ranked_module import RankedModule
from keylayers.scores.gradient_path import sum_of_shares
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options
from keylayers.training.options import TrainingOptions
from keylayers.training.run import fine_tune, make_trainer, new_adapter
from keylayers.training.step_scores import StepScores
from keylayers.updates import adapter_updates

NUM_VALIDATION = 96  # and as many for the mask
NUM_FORGETTING = 96
NUM_STEPS = 60
BATCH_SIZE = 8
LORA_RANK = 16
METHODS = ("elimination", "path", "ila", "gradient-norm", "update-norm")
MASKED = (0.05, 0.1, 0.3)  # shares of the modules whose updates are kept
NUM_RANDOM_MASKS = 3


class Clock(TrainerCallback):
    """CPU seconds of each step, which neighbours of the machine change little."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kw):
        """Start."""
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kw):
        """Stop."""
        self.seconds.append(time.process_time() - self.start)


class Cell:
    """One data set with one seed, and what was found of it so far."""

    def __init__(self, data, seed, given):
        self.data, self.seed, self.given = data, seed, given
        self.task = TASKS[data]
        self.options = ModelOptions(model=str(given.model), dtype="bfloat16")
        self.path = given.folder / f"{data}-{seed}.jsonl"
        self.rankings = given.folder / f"{data}-{seed}.rankings.json"
        self.masks = given.folder / f"{data}-{seed}.masks.json"
        self.adapter = given.folder / f"{data}-{seed}.safetensors"  # of all modules

    @property
    def results(self):
        """What is finished."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    @cached_property
    def tokenizer(self):
        """The model's."""
        return load_tokenizer(self.options)

    @cached_property
    def prepared(self):
        """Training, mask and validation examples."""
        options = DataOptions(
            data=str(self.given.data / self.task.train),
            max_length=self.task.max_length,
            max_examples=self.task.num_train,
            held_out=NUM_VALIDATION,
            mask_data="held-out",
        )
        return prepare(options, self.tokenizer)

    @cached_property
    def tests(self):
        """What is measured -> its examples, and the first tokens of the labels to choose from."""
        labels = {
            self.tokenizer(label, add_special_tokens=False)["input_ids"][0]: label
            for label in self.task.labels
        }
        assert len(labels) == len(self.task.labels)
        return {
            "test": (self.examples(self.data, self.task.num_test), [*labels]),
            "forgetting": (self.examples(self.task.forgets, NUM_FORGETTING), []),
        }

    def examples(self, data, count):
        """The first usable test examples of a data set, or its last ones if it has no test set."""
        task = TASKS[data]
        source = str(self.given.data / (task.test or task.train))
        found = read_conversations(DataOptions(data=source)).examples
        found = found if task.test else found[task.num_train :]
        template = resolve_template(self.tokenizer, None)
        encoded = encode_all(found, self.tokenizer, template, task.max_length)
        rows = [each.row for each in encoded if each.is_usable and not each.is_truncated]
        return [(row["input_ids"], row["labels"]) for row in rows[:count]]

    def trainer(self, names=None, rank=LORA_RANK, rate=1.0):
        """A trainer of fresh LoRA matrices on the modules; all if no names are given."""
        model = load_model(self.options)
        names = names or [module.name for module in map_modules(model)]
        options = TrainingOptions(
            seed=self.seed, batch_size=BATCH_SIZE, lora_rank=rank, lora_alpha=2 * rank
        )
        default = options.resolved_learning_rate(model.config.hidden_size, is_full=False)
        options = replace(options, learning_rate=rate * default)
        tuned = new_adapter(model, names, options, num_steps=NUM_STEPS)
        return make_trainer(
            tuned, self.tokenizer, self.prepared.train, options, num_steps=NUM_STEPS
        )

    def measured(self, trainer):
        """Losses in nats per token, and the accuracy among the labels, question by question."""
        found = {"validation_nats": held_out_loss(trainer, self.prepared.held_out)}
        for name, (examples, labels) in self.tests.items():
            losses, is_right = [], []
            trainer.model.eval()
            for start in range(0, len(examples), 16):
                own, right = answered(trainer.model, examples[start:][:16], labels)
                losses, is_right = losses + own, is_right + right
            found[f"{name}_nats"] = sum(nats for nats, _ in losses) / sum(n for _, n in losses)
            if labels:
                found["is_right"] = "".join("01"[right] for right in is_right)
        return found

    def base(self):
        """The model before any training."""
        self.write({"arm": "base", "rate": 1.0, **self.measured(self.trainer())})

    def train(self, arm, rate):
        """Train and measure one arm; the first one is ranked, too."""
        names, rank = None, LORA_RANK
        if arm.order != "all":
            ranked, widths, *more = self.ranked()
            names = arm.modules(ranked, self.seed, *more)
            if arm.is_of_all_parameters:
                rank = round(LORA_RANK * sum(widths.values()) / sum(widths[n] for n in names))
        trainer, clock = self.trainer(names, rank, rate), Clock()
        trainer.add_callback(clock)
        is_ranked = arm.order == "all" and rate == 1.0
        scores = StepScores()
        if is_ranked:
            trainer.add_callback(scores)
        result = fine_tune(trainer)
        found = {
            "arm": arm.name,
            "rate": rate,
            "num_modules": len(names or adapter_updates(trainer.model)),
            "lora_rank": rank,
            "num_trained_parameters": trainer.get_num_trainable_parameters(),
            "step_cpu_seconds": round(statistics.median(clock.seconds), 3),
            "training_nats": statistics.fmean(result.losses[-10:]),
            **self.measured(trainer),
        }
        if is_ranked:
            self.save(trainer)
            write_json(self.rankings, self.score(trainer, scores.scores))
        self.write(found)

    def score(self, trainer, step_scores):
        """Every method's scores of the fine-tune of all modules."""
        updates = adapter_updates(trainer.model)
        trainer.train_dataset = self.prepared.mask
        found = {"step-scores": {"scores": [*step_scores.values()], "forward_equivalents": 0}}
        for method in METHODS:
            scored = score_modules(trainer, updates, scoring_options(method))
            found[method] = {
                "scores": [float(f"{score:.6g}") for score in scored.scores],
                "forward_equivalents": scored.forward_equivalents,
            }
        return {
            "environment": environment(),
            "split_sha256": self.prepared.record()["split_sha256"],
            "num_head_parameters": trainer.model.get_output_embeddings().weight.numel(),
            "modules": [asdict(update.module) for update in updates],
            "methods": found,
        }

    def save(self, trainer):
        """Keep the adapter of all modules."""
        adapter = get_peft_model_state_dict(trainer.model)
        save_file({name: value.contiguous() for name, value in adapter.items()}, self.adapter)

    def mask(self):
        """Validation losses with only some updates of the fine-tune of all kept."""
        ranked, *_ = self.ranked()
        names = [module.name for module in ranked]
        trainer = self.trainer()
        if self.adapter.exists():
            set_peft_model_state_dict(trainer.model, load_file(self.adapter))
        else:
            fine_tune(trainer)
            self.save(trainer)
        chosen = [(order, 0) for order in ("best", "worst", "first", "last", "mlp")]
        chosen += [("random", draw) for draw in range(1, NUM_RANDOM_MASKS + 1)]
        found, updates = [], adapter_updates(trainer.model)
        with masked_losses(trainer, updates, self.prepared.held_out) as loss:
            ends = {"base": loss([]).mean, "all": loss(names).mean}
            for size in MASKED:
                for order, draw in chosen:
                    own = Arm(order, size, draw=draw).modules(ranked, self.seed)
                    found.append({"order": order, "draw": draw, "size": size})
                    found[-1]["validation_nats"] = loss(own).mean
        write_json(self.masks, {"environment": environment(), **ends, "masks": found})

    def ranked(self):
        """Modules with elimination's scores; sizes per rank; a record; gradient-path by name."""
        found = json.loads(self.rankings.read_text(encoding="utf-8"))
        infos = [ModuleInfo(**module) for module in found["modules"]]
        modules = tuple(map(RankedModule.of, infos, found["methods"]["elimination"]["scores"]))
        made_by = {
            "options": {"lora_rank": LORA_RANK},
            "model": {"num_head_parameters": found["num_head_parameters"]},
        }
        names = [info.name for info in infos]
        both = (found["methods"][method]["scores"] for method in ("gradient-norm", "path"))
        sums = sum_of_shares(*(torch.tensor([scores]).double() for scores in both))[0].tolist()
        to_retrain = dict(zip(names, sums, strict=True))
        return modules, {info.name: sum(info.shape) for info in infos}, made_by, to_retrain

    def write(self, found):
        """Add a finished result."""
        line = {"data": self.data, "seed": self.seed, **found}
        line["commit"] = environment()["commit"]
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        shown = {key: found.get(key) for key in ("arm", "rate", "validation_nats", "test_nats")}
        print(self.path.stem, *shown.values(), flush=True)

    def tried(self, arm):
        """Learning rate -> loss of the finished trainings of an arm, on examples that were new.

        Half of it is that of the last training steps: every batch is drawn once.
        """
        found = [one for one in self.results if one["arm"] == arm]
        return {one["rate"]: (one["validation_nats"] + one["training_nats"]) / 2 for one in found}

    def finish(self, arm, rates=None):
        """Train what is left of an arm: at `rates`, or at every rate until validation says stop."""
        while (rate := next_rate(self.tried(arm.name), rates)) is not None:
            self.train(arm, rate)


def answered(model, examples, labels):
    """Loss and number of tokens of each example, and whether the best of the labels is right."""
    logits, targets = predictions(examples, model)
    is_right = []
    for own, target in zip(logits, targets, strict=True) if labels else ():
        first = int((target != IGNORED).nonzero()[0])
        is_right.append(labels[int(own[first, labels].argmax())] == int(target[first]))
    return example_losses(logits, targets), is_right


def main():
    """Run what is left, or collect what is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tasks", nargs="+", default=["trec"], choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tiers", nargs="+", type=int, default=range(len(TIERS)))
    parser.add_argument("--collect", type=Path)
    given = parser.parse_args()
    if given.collect:
        collect(given.folder, given.collect)
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for task in given.tasks:
        first, *others = (Cell(task, seed, given) for seed in given.seeds)
        for tier in given.tiers:
            for cell in (first, *others):
                if not cell.results:
                    cell.base()
                cell.finish(Arm("all"), [1.0])  # what the others are chosen by
                if not cell.masks.exists():
                    cell.mask()
                for arm in TIERS[tier]:
                    tried = first.tried(arm.name)
                    cell.finish(arm, None if cell is first else [min(tried, key=tried.get)])


def collect(folder, path):
    """One record of all results."""
    results, rankings, masks = [], {}, {}
    for file in sorted(folder.glob("*.jsonl")):
        results += [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for file in sorted(folder.glob("*.rankings.json")):
        rankings[file.name.removesuffix(".rankings.json")] = json.loads(file.read_text())
    for file in sorted(folder.glob("*.masks.json")):
        masks[file.name.removesuffix(".masks.json")] = json.loads(file.read_text())
    write_json(path, {"results": results, "rankings": rankings, "masks": masks})


if __name__ == "__main__":
    main()
