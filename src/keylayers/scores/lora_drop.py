# SPDX-License-Identifier: Apache-2.0
"""LoRA-drop: how large the output of each update is on the data.

    s_i = mean over tokens of ‖Δθ_i x‖²

Source: Zhou, Lu, Xu, Zhu, Zhao, Yang: "LoRA-drop: Efficient LoRA Parameter Pruning based on Output
    Evaluation", COLING 2025, arXiv:2402.07721.
Differs: the paper divides by the sum over modules, which changes no order, and lets the modules
    left out share one LoRA, which is not part of a ranking. No code is public.
Cost: `mask_batches` forward passes.
Blind to: whether the output helps the loss; modules with large outputs win.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from keylayers.scores.module_scores import ModuleScores
from keylayers.scores.options import Batched
from keylayers.scores.probe import observed_inputs, per_example, token_mask
from keylayers.scores.task import MaskedModel, Task
from keylayers.updates import Update


def lora_drop(task: Task, options: Batched) -> ModuleScores:
    """The mean squared output of each update in the fine-tuned model."""
    with task.masked(options.mask_batches, looks_inside=True) as masked:
        sizes = [_output_sizes(masked, task.updates, batch) for batch in masked.batches]
        return masked.mean(torch.stack(sizes), unit="squared norm of the output")


def _output_sizes(
    masked: MaskedModel, updates: Sequence[Update], batch: Any
) -> Float[Tensor, " module"]:
    sizes = torch.zeros(len(updates))

    def see(index: int, x: Tensor) -> None:
        x = per_example(x, batch)
        tokens = x[token_mask(batch, x)].float()
        output = tokens @ updates[index].delta().to(tokens.device).T
        sizes[index] = float(output.square().sum(dim=-1).mean())

    with observed_inputs(updates, see):
        masked.loss(1.0, batch)
    return sizes
