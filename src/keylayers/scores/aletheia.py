# SPDX-License-Identifier: Apache-2.0
"""Aletheia: gradient norm by block.

    s_block = Σ over modules of the block, mean over batches, of ‖∂L/∂W (θ_0)‖_F

Source: Saket: "Aletheia: Gradient-Guided Layer Selection for Efficient LoRA Fine-Tuning", 2026,
    arXiv:2604.15351, and its code (aletheia-lora 0.1.2, Apache-2.0), read, not copied.
Differs: the trainer's own batches and labels (the code takes single examples with the loss on all
    tokens); norm weights, which it adds to a block's sum, are left out; a mean over batches where
    it sums, which changes no order.
Cost: as `gradient_norm`.
Blind to: the modules inside a block, which share its score; and what gradient norm is blind to.
"""

from collections.abc import Sequence

import torch
from transformers import Trainer

from keylayers.options import MaskOptions
from keylayers.progress import OnStep
from keylayers.scores.gradient_norm import weight_gradient_norms
from keylayers.scores.module_scores import ModuleScores, block_indices
from keylayers.scores.scoring import mean_and_error, scoring
from keylayers.updates import Update


def aletheia(
    trainer: Trainer,
    updates: Sequence[Update],
    options: MaskOptions,
    on_step: OnStep | None = None,
) -> ModuleScores:
    """The summed gradient norm of each update's block in the base model."""
    blocks = torch.tensor(block_indices(updates))
    same_block = (blocks[:, None] == blocks[None, :]).float()
    with scoring(trainer, updates, options, on_step, looks_inside=True) as task:
        mean, error = mean_and_error(weight_gradient_norms(task) @ same_block)
        return task.result(mean, unit="norm of the gradient", standard_errors=error)
