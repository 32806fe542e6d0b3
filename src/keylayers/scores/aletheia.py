# SPDX-License-Identifier: Apache-2.0
"""Aletheia: gradient norm by block.

    s_block = Σ over modules of the block, mean over batches, of ‖∂L/∂W (θ_0)‖_F

Source: Saket: "Aletheia: Gradient-Guided Layer Selection for Efficient LoRA Fine-Tuning", 2026,
    arXiv:2604.15351, and its code (aletheia-lora 0.1.2, Apache-2.0), read, not copied.
Differs: takes the trainer's own batches and labels (the code takes single examples with the loss on
    all tokens), leaves out norm weights, and averages over batches where the code sums.
Cost: as `gradient_norm`.
Blind to: the modules inside a block, which share its score; and what gradient norm is blind to.
"""

import torch

from keylayers.scores.gradient_norm import weight_gradient_norm
from keylayers.scores.options import Batched
from keylayers.scores.probe import gradient_values
from keylayers.scores.task import ModuleScores, Task


def aletheia(task: Task, options: Batched) -> ModuleScores:
    """The summed gradient norm of each update's block in the base model."""
    blocks = torch.tensor(task.blocks())
    same_block = (blocks[:, None] == blocks[None, :]).float()
    with task.masked(options.mask_batches, looks_inside=True) as masked:
        norms = gradient_values(masked, task, weight_gradient_norm)
        return masked.mean(norms @ same_block, unit="norm of the gradient")
