# SPDX-License-Identifier: Apache-2.0
"""Memory of the process over 5,000 mask steps, beside as many bare passes of the same model.

Each side in a process of its own, which learns the scores of a small model's 56 modules, or only
computes the loss and its gradient for activations. Memory is what the system holds for the process.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from benchmarks.mask_step import frozen, step

NUM_STEPS = 5000
EVERY_STEPS = 50
WARM_UP = 0.2  # share of the steps in which allocators and caches settle
VOCABULARY, TOKENS, BATCH = 128, 32, 4
SIDES = ("mask steps", "bare passes")


def run() -> dict[str, Any]:
    """Both sides: memory after every 50 steps, and how it grows after the first fifth."""
    sides = {}
    for side in SIDES:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.long_run", side]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        sides[side] = json.loads(done.stdout.splitlines()[-1])
        grown = sides[side]["grown_mib_per_1000_steps"]
        print(f"{side}: {grown:+.3f} MiB per 1,000 steps, {sides[side]['seconds']:.0f} s")
    return {"num_steps": NUM_STEPS, "every_steps": EVERY_STEPS, "sides": sides}


def one_side(side: str) -> dict[str, Any]:
    """Memory in MiB after every 50 steps of one side."""
    model = make_model()
    start = time.perf_counter()
    mib = mask_steps(model) if side == SIDES[0] else bare_passes(model)
    steps = EVERY_STEPS * np.arange(1, len(mib) + 1)
    settled = steps > WARM_UP * NUM_STEPS
    slope = np.polyfit(steps[settled], np.array(mib)[settled], 1)[0]
    return {
        "mib": mib,
        "grown_mib_per_1000_steps": 1000 * float(slope),
        "seconds": time.perf_counter() - start,
    }


def make_model() -> PeftModel:
    """A random Llama of 8 blocks with LoRA r = 4 on all 56 modules; B is not zero."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), lora)


def mask_steps(model: PeftModel) -> list[float]:
    """ILA as published, by the trainer's own loss and loader."""
    import tempfile

    from keylayers import rank_modules

    mib: list[float] = []

    def see(number: int, _: float) -> None:
        if number % EVERY_STEPS == 0:
            mib.append(resident_mib())

    rows = torch.randint(1, VOCABULARY, (64, TOKENS)).tolist()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, per_device_train_batch_size=BATCH, use_cpu=True, report_to="none"
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
            data_collator=lambda rows: {
                key: torch.tensor([row[key] for row in rows]) for key in rows[0]
            },
        )
        rank_modules(trainer, "ila", mask_steps=NUM_STEPS, on_step=see)
    return mib


def bare_passes(model: PeftModel) -> list[float]:
    """Loss and its gradient for activations, nothing else."""
    mib = []
    with frozen(model):
        for number in range(1, NUM_STEPS + 1):
            step(model, torch.randint(1, VOCABULARY, (BATCH, TOKENS)))
            if number % EVERY_STEPS == 0:
                mib.append(resident_mib())
    return mib


def resident_mib() -> float:
    """What the system holds in memory for this process, on Linux."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(one_side(sys.argv[1])))
