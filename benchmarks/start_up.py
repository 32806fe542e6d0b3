# SPDX-License-Identifier: Apache-2.0
"""How long you wait: `--help`, `show`, and `rank` until its first step, against plain TRL.

Every side is a process of its own, in turn; wall time.
"""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.sides import in_turn, last_line_of
from keylayers.demo.files import BASE, write_data
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking

NUM_ROUNDS = 5
FIRST_STEP = """
import os
from transformers import TrainerCallback

class FirstStep(TrainerCallback):
    def on_step_end(self, *given, **named):
        os._exit(0)
"""
KEYLAYERS = "import sys; from keylayers.cli import main; main(sys.argv[1:])"
# stage 1's trainer gets a callback more; everything before its first step is as users have it
RANK = f"""
import sys
import keylayers.training.run as run
{FIRST_STEP}
make = run.make_trainer
def with_callback(*given, **named):
    trainer = make(*given, **named)
    trainer.add_callback(FirstStep())
    return trainer
run.make_trainer = with_callback
{KEYLAYERS}
"""
TRL = f"""
import sys
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer
{FIRST_STEP}
SFTTrainer(
    model=sys.argv[1],
    args=SFTConfig(sys.argv[3], bf16=False, report_to="none", gradient_checkpointing=False),
    train_dataset=Dataset.from_json(sys.argv[2]),
    peft_config=LoraConfig(r=16, target_modules="all-linear"),
    callbacks=[FirstStep()],
).train()
"""


def run() -> dict[str, Any]:
    """Start each in turn, print medians and return the record."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data.jsonl", "polite")
        module = RankedModule("model.layers.0.mlp.up_proj", 0, "up_proj", 10, 1.0)
        Ranking((module,), "by hand").save(folder / "ranking.json")
        model, data, out = str(BASE), str(folder / "data.jsonl"), str(folder / "out")
        commands = {
            "keylayers --help": (KEYLAYERS, "--help"),
            "keylayers show": (KEYLAYERS, "show", str(folder / "ranking.json")),
            "keylayers rank, to its first step": (
                RANK, "rank", "--model", model, "--data", data, "--output", out,
            ),
            "plain TRL, to its first step": (TRL, model, data, str(folder / "trl")),
        }  # fmt: skip
        sides = {
            title: lambda words=words: last_line_of("-c", *words)
            for title, words in commands.items()
        }
        seconds = in_turn(sides, NUM_ROUNDS)
    print(json.dumps({title: round(statistics.median(one), 2) for title, one in seconds.items()}))
    return {"rounds": NUM_ROUNDS, "seconds": seconds}
