# SPDX-License-Identifier: Apache-2.0
"""How time and kept memory grow with blocks, sequence and batch, for both stages.

Slopes of log against log: 1 is linear. Stage 1 is a training step of LoRA on all modules, stage 2
a mask step. The growth beyond linear that attention itself has stands beside, as that of a bare
pass through the frozen model.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.mask_step import all_lora, frozen, gates_on_a, kept_storage, step

VOCABULARY = 256
REPEATS = 3
BASIS = {"blocks": 8, "tokens": 256, "batch": 2}
VALUES = {
    "blocks": (4, 8, 16, 32, 80),
    "tokens": (128, 256, 512, 1024, 2048, 4096),
    "batch": (1, 2, 4, 8, 16),
}
MODES: dict[str, Callable[[PeftModel], AbstractContextManager[None]]] = {
    "bare pass": frozen,
    "training step": all_lora,
    "mask step": gates_on_a,
}


def make_model(blocks: int) -> PeftModel:
    """A random Llama of width 128 with LoRA r = 8 on all modules, 7 a block."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    return get_peft_model(LlamaForCausalLM(config), lora)


def measured(blocks: int, tokens: int, batch: int) -> dict[str, dict[str, float]]:
    """Median seconds and kept MiB of each mode at one size, alternating."""
    model = make_model(blocks)
    rows = torch.randint(0, VOCABULARY, (batch, tokens))
    seconds: dict[str, list[float]] = {name: [] for name in MODES}
    kept = {}
    for name, mode in MODES.items():
        with mode(model):
            kept[name] = kept_storage(model, lambda: step(model, rows)) / 2**20
    for _ in range(REPEATS):
        for name, mode in MODES.items():
            with mode(model):
                model.zero_grad()
                start = time.perf_counter()
                step(model, rows)
                seconds[name].append(time.perf_counter() - start)
    return {
        name: {"seconds": statistics.median(seconds[name]), "kept_mib": kept[name]}
        for name in MODES
    }


def run() -> dict[str, Any]:
    """Measure along each axis, fit, print and return the record."""
    torch.set_num_threads(1)
    record: dict[str, Any] = {}
    for axis, values in VALUES.items():
        found = [measured(**{**BASIS, axis: value}) for value in values]
        record[axis] = {"values": values, "modes": {}}
        for name in MODES:
            row: dict[str, Any] = {}
            for what in ("seconds", "kept_mib"):
                numbers = [one[name][what] for one in found]
                # the upper half: what small sizes cost beside is no growth
                half = len(values) // 2
                fitted = np.polyfit(np.log(values[half:]), np.log(numbers[half:]), 1)
                row[what] = numbers
                row[f"{what}_slope"] = float(fitted[0])
            record[axis]["modes"][name] = row
            print(
                f"{axis:<8}{name:<14} time ^ {row['seconds_slope']:.2f}, "
                f"kept ^ {row['kept_mib_slope']:.2f}"
            )
    return {"basis": BASIS, "axes": record}
