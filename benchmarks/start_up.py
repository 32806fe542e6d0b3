# SPDX-License-Identifier: Apache-2.0
"""How long people wait: `--help`, `show`, and `rank` until its first step, against plain TRL.

Every side is a process of its own, in turn; wall time.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from keylayers.demo.run import BASE, write_data
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking

NUM_ROUNDS = 5
HELP = "from keylayers.cli import main; main(['--help'])"
SHOW = "import sys; from keylayers.cli import main; main(['show', sys.argv[1]])"
RANK = """
import sys
from pathlib import Path
import keylayers
from keylayers.progress import Silent

class FirstStep(Silent):
    def stage(self, title, total):
        import contextlib, os
        def stop(step, loss):
            os._exit(0)
        return contextlib.nullcontext(stop)

options = keylayers.RankOptions(
    keylayers.ModelOptions(model=sys.argv[1]), keylayers.DataOptions(data=sys.argv[2])
)
keylayers.rank(options, Path(sys.argv[3]), FirstStep())
"""
TRL = """
import sys, os
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

class FirstStep(TrainerCallback):
    def on_step_end(self, *given, **named):
        os._exit(0)

trainer = SFTTrainer(
    model=sys.argv[1],
    args=SFTConfig(sys.argv[3], bf16=False, report_to="none", gradient_checkpointing=False),
    train_dataset=Dataset.from_json(sys.argv[2]),
    peft_config=LoraConfig(r=16, target_modules="all-linear"),
    callbacks=[FirstStep()],
)
trainer.train()
"""


def run() -> dict[str, Any]:
    """Start each in turn, print medians and the difference to TRL, return the record."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data.jsonl", "polite")
        one = RankedModule("model.layers.0.mlp.up_proj", 0, "up_proj", 10, 1.0)
        Ranking((one,), "by hand").save(folder / "ranking.json")
        files = (str(BASE), str(folder / "data.jsonl"))
        sides = {
            "keylayers --help": (HELP,),
            "keylayers show": (SHOW, str(folder / "ranking.json")),
            "keylayers rank, to its first step": (RANK, *files, str(folder / "out")),
            "plain TRL, to its first step": (TRL, *files, str(folder / "trl")),
        }
        seconds: dict[str, list[float]] = {title: [] for title in sides}
        for _ in range(NUM_ROUNDS):
            for title, command in sides.items():
                start = time.perf_counter()
                subprocess.run(
                    [sys.executable, "-W", "ignore", "-c", *command],
                    check=True,
                    capture_output=True,
                )
                seconds[title].append(time.perf_counter() - start)
    for title, found in seconds.items():
        print(
            f"{title:<36} {statistics.median(found):.2f} s ({min(found):.2f} to {max(found):.2f})"
        )
    return {"rounds": NUM_ROUNDS, "seconds": seconds}
