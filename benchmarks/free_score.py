# SPDX-License-Identifier: Apache-2.0
"""What it costs to score modules from stage 1's own steps: a training step with and without."""

from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from benchmarks.mask_step import BATCH, TOKENS, VOCABULARY, make_model
from benchmarks.sides import in_turn, ratio, shown
from keylayers.training.step_scores import StepScores

NUM_ROUNDS = 20


def run() -> dict[str, Any]:
    """Alternate steps with and without, print the ratio and return the record."""
    model = make_model()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    tokens = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    scores = StepScores()
    given = (TrainingArguments(use_cpu=True), TrainerState(), TrainerControl())
    scores.on_train_begin(*given, model=model)

    def step(*, is_scored: bool) -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        if is_scored:
            scores.on_pre_optimizer_step(*given)
        optimizer.step()
        if is_scored:
            scores.on_optimizer_step(*given)
        optimizer.zero_grad()

    step(is_scored=True)
    sides = {"without": lambda: step(is_scored=False), "with": lambda: step(is_scored=True)}
    seconds = in_turn(sides, NUM_ROUNDS)
    found = ratio(seconds["with"], seconds["without"])
    print(f"a step with scores takes x {shown(found, 3)} of one without")
    return {"seconds": seconds, **found}
