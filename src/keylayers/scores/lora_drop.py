# SPDX-License-Identifier: Apache-2.0
"""LoRA-drop: how large the output of each update is on the data.

    s_i = mean over tokens of ‖Δθ_i x‖²

Source: Zhou, Lu, Xu, Zhu, Zhao, Yang: "LoRA-drop: Efficient LoRA Parameter Pruning based on Output
    Evaluation", COLING 2025, arXiv:2402.07721.
Differs: the paper divides by the sum over modules, which changes no order, and lets the modules
    left out share one LoRA, which is no part of a ranking. No code is public.
Cost: `mask_batches` forward passes.
Blind to: whether the output helps the loss; modules with large outputs win.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import Trainer

from keylayers.options import MaskOptions
from keylayers.progress import OnStep
from keylayers.scores.module_scores import ModuleScores
from keylayers.scores.probe import observed_inputs, per_example, token_mask
from keylayers.scores.scoring import Scoring, mean_and_error, scoring
from keylayers.updates import Update


def lora_drop(
    trainer: Trainer,
    updates: Sequence[Update],
    options: MaskOptions,
    on_step: OnStep | None = None,
) -> ModuleScores:
    """The mean squared output of each update in the fine-tuned model."""
    with scoring(trainer, updates, options, on_step, looks_inside=True) as task:
        sizes = torch.stack([_output_sizes(task, batch) for batch in task.batches])
        mean, error = mean_and_error(sizes)
        return task.result(mean, unit="squared norm of the output", standard_errors=error)


def _output_sizes(task: Scoring, batch: Any) -> Float[Tensor, " module"]:
    sizes = torch.zeros(len(task.updates))

    def see(index: int, x: Tensor) -> None:
        x = per_example(x, batch)
        tokens = x[token_mask(batch, x)].float()
        output = tokens @ task.updates[index].delta().to(tokens.device).T
        sizes[index] = float(output.square().sum(dim=-1).mean())

    with observed_inputs(task.updates, see):
        task.loss(1.0, batch)
    return sizes
