# SPDX-License-Identifier: Apache-2.0
"""Cells of the studies: one fine-tune of one model on one data set with one seed, kept in a folder.

A cell has three splits that never mix: train (stage 1), mask (what scores may be learned on), and
held out (what a ranking is measured on). Made once and taken from its folder afterwards.
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from keylayers.data.options import DataOptions
from keylayers.data.prepare import prepare
from keylayers.demo.world import BASE, write_data
from keylayers.environment import environment
from keylayers.evaluation.held_out import held_out_loss
from keylayers.files import json_sha256, write_json
from keylayers.model.loading import load_model, load_tokenizer, max_positions
from keylayers.model.modules import map_modules
from keylayers.model.options import ModelOptions
from keylayers.training.options import TrainingOptions
from keylayers.training.run import fine_tune, make_trainer, new_adapter
from keylayers.training.step_scores import StepScores
from keylayers.updates import adapter_updates

DEMO = ("polite", "list", "terse")
REAL = ("alpaca", "dpo", "user")
OVERFIT = "user-long"  # trained so long that the held-out loss rises again
FILES = {
    "alpaca": "sft/alpaca_gpt4_999.json",
    "dpo": "preference/dpo_300.json",
    "user": "sft/user_oriented_252.jsonl",
    OVERFIT: "sft/user_oriented_252.jsonl",
}
# Steps of stage 1 at a constant rate; the two small sets would overfit in more.
NUM_STEPS = {"alpaca": 200, "dpo": 40, "user": 50, OVERFIT: 100}
MAX_LENGTH = 128
NUM_HELD_OUT = 50  # and as many for the mask


@dataclass(frozen=True)
class Cell:
    """Which fine-tune: `data` is a style of the demo or one of the real data sets."""

    data: str
    seed: int

    @property
    def steps(self):
        """Of stage 1."""
        return NUM_STEPS.get(self.data, 200)

    @property
    def name(self):
        """Its folder."""
        return f"{self.data}-{self.seed}"

    @property
    def is_demo(self):
        """On the built-in model, not on `english-2m`."""
        return self.data in DEMO

    def training(self):
        """How it is fine-tuned."""
        if self.is_demo:
            return TrainingOptions(batch_size=16, lora_rank=8, lora_alpha=16, seed=self.seed)
        return TrainingOptions(seed=self.seed)


ALL = [Cell(data, seed) for seed in range(5) for data in (*DEMO, *REAL)]
ALL.append(Cell(OVERFIT, 0))


@dataclass
class Loaded:
    """A cell in memory, ready to be scored and measured."""

    cell: Cell
    trainer: object
    train: object
    mask: object
    held_out: object
    record: dict

    @property
    def updates(self):
        """The updates that are ranked."""
        return adapter_updates(self.trainer.model)


def data_file(cell, folder, shared):
    """The cell's data as a file that keylayers reads."""
    if cell.is_demo:
        path = folder / f"{cell.data}.jsonl"
        write_data(path, cell.data)
    elif cell.data == "dpo":  # the chosen answers of the pairs, as conversations
        path = folder / "dpo.jsonl"
        pairs = json.loads((shared / "data" / FILES["dpo"]).read_text(encoding="utf-8"))
        rows = [{"conversations": [*pair["conversations"], pair["chosen"]]} for pair in pairs]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path = shared / "data" / FILES[cell.data]
    return path


def fresh(cell, folder, shared, names=None, num_steps=None):
    """The cell before its fine-tune: new LoRA on `names` (all modules if not given), and splits.

    It trains for `num_steps`, by default those of stage 1.
    """
    model_path = BASE if cell.is_demo else shared / "models" / "english-2m"
    options = ModelOptions(model=str(model_path), dtype="float32")
    tokenizer, model = load_tokenizer(options), load_model(options)
    data = prepare(
        DataOptions(
            data=str(data_file(cell, folder, shared)),
            max_length=MAX_LENGTH,
            held_out=NUM_HELD_OUT,
            mask_data="held-out",
        ),
        tokenizer,
        max_positions(model),
    )
    names = names or [info.name for info in map_modules(model)]
    tuned = new_adapter(model, names, cell.training(), num_steps=1)
    num_steps = num_steps or cell.steps
    trainer = make_trainer(tuned, tokenizer, data.train, cell.training(), num_steps=num_steps)
    record = {"cell": asdict(cell) | {"steps": cell.steps}, "data": data.record()}
    record["data"].pop("data")  # a path of this machine
    return Loaded(cell, trainer, data.train, data.mask, data.held_out, record)


def load(cell, folder, shared):
    """The fine-tuned cell; made if it is not in `folder`."""
    loaded = fresh(cell, folder, shared)
    home = folder / cell.name
    inputs = json_sha256(loaded.record | {"training": asdict(cell.training())})
    path = home / "cell.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if record.get("inputs_sha256") != inputs:
        record = _make(loaded, home) | {"inputs_sha256": inputs}
        write_json(path, record)
    set_peft_model_state_dict(loaded.trainer.model, load_file(home / "end.safetensors"))
    return replace(loaded, record=record)


def _make(loaded, home):
    home.mkdir(parents=True, exist_ok=True)
    trainer, scores = loaded.trainer, StepScores()
    trainer.add_callback(scores)
    base = held_out_loss(trainer, loaded.held_out)
    result = fine_tune(trainer)
    trainer.remove_callback(scores)
    end = {k: v.contiguous() for k, v in get_peft_model_state_dict(trainer.model).items()}
    save_file(end, home / "end.safetensors")
    return loaded.record | {
        "environment": environment(),
        "losses": list(result.losses),
        "seconds": result.seconds,
        "held_out_loss_nats": {"base": base, "tuned": held_out_loss(trainer, loaded.held_out)},
        "stage_1_path": list(scores.scores.values()),
    }


def parser(description):
    """The command line that the studies of cells have in common."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("folder", type=Path)
    found.add_argument("--shared", type=Path)
    found.add_argument("--data", nargs="+", default=[*DEMO, *REAL])
    found.add_argument("--collect", type=Path)
    return found


def collect(files, path):
    """One record of the cells that have a file."""
    texts = [file.read_text(encoding="utf-8") for file in files if file.exists()]
    write_json(path, {"cells": [json.loads(text) for text in texts]})
