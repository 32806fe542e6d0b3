# SPDX-License-Identifier: Apache-2.0
"""Gradient norm and Aletheia: how strongly the loss of the base model pulls at a weight or block.

    gradient-norm: s_i = mean over batches of ‖∂L/∂W_i (θ_0)‖_F
    aletheia: s_block = Σ over modules i of the block of s_i

Source: Saket: "Aletheia: Gradient-Guided Layer Selection for Efficient LoRA Fine-Tuning", 2026,
    arXiv:2604.15351, and its code (aletheia-lora 0.1.2, Apache-2.0), read, not copied. `aletheia`
    is the published score; `gradient-norm` is its gradient probe per module.
Differs: takes the trainer's own batches and labels (the code takes single examples with the loss on
    all tokens), leaves out norm weights, and averages over batches where the code sums.
Cost: `mask_batches` forward and backward passes, and one weight gradient at a time, which the
    count of forward equivalents leaves out.
Blind to: how far the fine-tune will follow the gradient; a large weight has a large gradient.
    `aletheia` also to the modules inside a block, which share its score.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keylayers.scores.options import Batched
from keylayers.scores.probe import layer_values, linear_layers
from keylayers.scores.task import MaskedModel, ModuleScores, Task


def gradient_norm(task: Task, options: Batched) -> ModuleScores:
    """The mean gradient norm of each update's module in the base model."""
    with task.masked(options.mask_batches, looks_inside=True) as masked:
        return masked.mean(gradient_norms(masked, task), unit="norm of the gradient")


def aletheia(task: Task, options: Batched) -> ModuleScores:
    """The summed gradient norm of each update's block in the base model."""
    blocks = torch.tensor(task.blocks())
    same_block = (blocks[:, None] == blocks[None, :]).float()
    with task.masked(options.mask_batches, looks_inside=True) as masked:
        return masked.mean(gradient_norms(masked, task) @ same_block, unit="norm of the gradient")


def gradient_norms(masked: MaskedModel, task: Task) -> Float[Tensor, "batch module"]:
    """Norm of the loss's gradient by each updated weight of the base model, batch by batch."""

    def norm(batch: Any, _: int, x: Tensor, grad_y: Tensor) -> float:
        gradient = grad_y.flatten(0, -2).float().T @ x.flatten(0, -2).float()
        return float(gradient.norm())

    return layer_values(masked, linear_layers(task), norm, with_gradient=True)
