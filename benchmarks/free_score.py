# SPDX-License-Identifier: Apache-2.0
"""What it costs to score modules from stage 1's own steps: a training step with and without."""

import statistics
import time
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from benchmarks.mask_step import BATCH, TOKENS, VOCABULARY, make_model
from keylayers.training.step_scores import StepScores

NUM_ROUNDS = 20


def run() -> dict[str, Any]:
    """Alternate steps with and without, print the ratio and return the record."""
    torch.set_num_threads(1)
    model = make_model()
    trained = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    scores = StepScores()
    given = (TrainingArguments(use_cpu=True), TrainerState(), TrainerControl())
    scores.on_train_begin(*given, model=model)

    def step(is_scored: bool) -> float:
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        if is_scored:
            scores.on_pre_optimizer_step(*given)
        optimizer.step()
        if is_scored:
            scores.on_optimizer_step(*given)
        optimizer.zero_grad()
        return time.perf_counter() - start

    step(True)
    pairs = [(step(False), step(True)) for _ in range(NUM_ROUNDS)]
    ratios = [own / plain for plain, own in pairs]
    low, high = statistics.quantiles(ratios, n=4)[::2]
    median = statistics.median(ratios)
    print(f"a step with scores takes x {median:.3f} ({low:.3f} to {high:.3f}) of one without")
    return {"seconds": pairs, "time_ratio_median": median, "time_ratio_quartiles": [low, high]}
