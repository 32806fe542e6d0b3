# SPDX-License-Identifier: Apache-2.0
"""How time and kept memory grow with blocks, sequence length and batch size, for both stages.

Exponents of a fit on a log-log scale: 1 is linear. Stage 1 is a training step of LoRA on all
modules, stage 2 a mask step. A bare pass through the frozen model shows the growth of attention.
"""

import statistics
from typing import Any

import numpy as np
import torch

from benchmarks.mask_step import LIMIT, measured
from benchmarks.sides import random_llama, with_lora

VOCABULARY = 256
REPEATS = 3
BASIS = {"blocks": 8, "tokens": 256, "batch": 2}
VALUES = {
    "blocks": (4, 8, 16, 32, 80),
    "tokens": (128, 256, 512, 1024, 2048, 4096),
    "batch": (1, 2, 4, 8, 16),
}
MODES = {
    "bare pass": LIMIT,
    "training step": "training all LoRA",
    "mask step": "gates on A (keylayers)",
}


def at_size(blocks: int, tokens: int, batch: int) -> dict[str, dict[str, float]]:
    """Median seconds and kept MiB of each mode at one size."""
    base = random_llama(
        128, blocks, VOCABULARY, intermediate_size=352, num_attention_heads=4,
        max_position_embeddings=4096,
    )  # fmt: skip
    rows = torch.randint(0, VOCABULARY, (batch, tokens))
    seconds, kept = measured(with_lora(base), rows, [*MODES.values()], REPEATS)
    return {
        name: {"seconds": statistics.median(seconds[mode]), "kept_mib": kept[mode]}
        for name, mode in MODES.items()
    }


def run() -> dict[str, Any]:
    """Measure along each axis, fit, print and return the record."""
    record: dict[str, Any] = {}
    for axis, values in VALUES.items():
        found = [at_size(**{**BASIS, axis: value}) for value in values]
        record[axis] = {"values": values, "modes": {}}
        upper = slice(len(values) // 2, None)  # overhead dominates small sizes
        for name in MODES:
            row: dict[str, Any] = {}
            for what in ("seconds", "kept_mib"):
                row[what] = [size[name][what] for size in found]
                fit = np.polyfit(np.log(values[upper]), np.log(row[what][upper]), 1)
                row[f"{what}_slope"] = float(fit[0])
            record[axis]["modes"][name] = row
            print(f"{axis:<8}{name:<14} time ^ {row['seconds_slope']:.2f}")
    return {"basis": BASIS, "axes": record}
