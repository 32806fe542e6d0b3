# SPDX-License-Identifier: Apache-2.0
"""PLoP: place LoRA where a weight's features are least aligned with its inputs.

    NFN_i = mean ‖W_i x̂‖ / mean ‖W_i ẑ‖,   x̂ = x / ‖x‖,   ẑ random of unit length;      s_i = -NFN_i

Source: Hayou, Ghosh, Yu: "PLoP: Precise LoRA Placement for Efficient Finetuning of Large Models",
    2025, arXiv:2506.20629; the score as in its code (soufiane001/plop), read, not copied.
Differs: one score per module; the paper averages over the modules of a projection and picks
    projections. Padding is left out. The norm for random unit vectors is not sampled:
    mean ‖W ẑ‖² = ‖W‖_F² / d_in.
Cost: `mask_batches` forward passes of the base model.
Blind to: the loss and the update.
"""

from typing import Any

from torch import Tensor

from keylayers.model.weights import base_weight
from keylayers.scores.options import Batched
from keylayers.scores.probe import layer_values, linear_layers, tokens_of
from keylayers.scores.task import ModuleScores, Task


def plop(task: Task, options: Batched) -> ModuleScores:
    """Minus the normalised feature norm of each update's module in the base model."""

    def feature_norm(batch: Any, index: int, x: Tensor, _: Tensor) -> float:
        weight, tokens = base_weight(task.updates[index].layer), tokens_of(batch, x)
        unit = tokens / tokens.norm(dim=-1, keepdim=True).clamp_min(1e-8)
        by_chance = weight.norm() / weight.shape[1] ** 0.5
        return float((unit @ weight.T).norm(dim=-1).mean() / by_chance)

    with task.masked(options.mask_batches, looks_inside=True) as masked:
        norms = layer_values(masked, linear_layers(task), feature_norm)
        return masked.mean(-norms, unit="minus the feature norm")
