# SPDX-License-Identifier: Apache-2.0
"""Gradient norm: how strongly the loss of the base model pulls at a weight.

    s_i = mean over batches of ‖∂L/∂W_i (θ_0)‖_F

Source: the gradient probe of Aletheia (Saket: "Aletheia: Gradient-Guided Layer Selection for
    Efficient LoRA Fine-Tuning", 2026, arXiv:2604.15351), one module at a time; `aletheia` has it by
    block, as published.
Differs: norms of modules, not of blocks; the trainer's own batches and labels.
Cost: `mask_batches` forward and backward passes; the weight gradient of one module at a time, which
    a count of forward equivalents leaves out.
Blind to: how far the fine-tune will follow the gradient; a large weight has a large gradient.
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
from keylayers.scores.probe import observed_gradients
from keylayers.scores.scoring import Scoring, mean_and_error, scoring
from keylayers.updates import Update


def gradient_norm(
    trainer: Trainer,
    updates: Sequence[Update],
    options: MaskOptions,
    on_step: OnStep | None = None,
) -> ModuleScores:
    """The mean gradient norm of each update's module in the base model."""
    with scoring(trainer, updates, options, on_step, looks_inside=True) as task:
        norms = weight_gradient_norms(task)
        mean, error = mean_and_error(norms)
        return task.result(mean, unit="norm of the gradient", standard_errors=error)


def weight_gradient_norms(task: Scoring) -> Float[Tensor, "batch module"]:
    """‖∂L/∂W‖_F of each module of the base model, for each batch."""
    return torch.stack([_norms(task, batch) for batch in task.batches])


def _norms(task: Scoring, batch: Any) -> Float[Tensor, " module"]:
    norms = torch.zeros(len(task.updates))

    def see(index: int, x: Tensor, grad_y: Tensor) -> None:
        gradient = grad_y.flatten(0, -2).float().T @ x.flatten(0, -2).float()
        norms[index] = float(gradient.norm())

    with observed_gradients(task.updates, see):
        task.gradient(0.0, batch)
    return norms
