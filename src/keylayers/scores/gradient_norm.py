# SPDX-License-Identifier: Apache-2.0
"""Gradient norm: how strongly the loss of the base model pulls at a weight.

    s_i = mean over batches of ‖∂L/∂W_i (θ_0)‖_F

Source: the gradient probe of Aletheia (Saket: "Aletheia: Gradient-Guided Layer Selection for
    Efficient LoRA Fine-Tuning", 2026, arXiv:2604.15351), per module; `aletheia` is the published
    score per block.
Differs: norms of modules, not of blocks; the trainer's own batches and labels.
Cost: `mask_batches` forward and backward passes, and one weight gradient at a time, which the
    count of forward equivalents leaves out.
Blind to: how far the fine-tune will follow the gradient; a large weight has a large gradient.
"""

from typing import Any

from torch import Tensor

from keylayers.scores.options import Batched
from keylayers.scores.probe import gradient_values
from keylayers.scores.task import ModuleScores, Task


def gradient_norm(task: Task, options: Batched) -> ModuleScores:
    """The mean gradient norm of each update's module in the base model."""
    with task.masked(options.mask_batches, looks_inside=True) as masked:
        norms = gradient_values(masked, task, weight_gradient_norm)
        return masked.mean(norms, unit="norm of the gradient")


def weight_gradient_norm(batch: Any, x: Tensor, grad_y: Tensor) -> float:
    """‖∂L/∂W‖_F of a module, from its input and ∂L/∂output."""
    gradient = grad_y.flatten(0, -2).float().T @ x.flatten(0, -2).float()
    return float(gradient.norm())
