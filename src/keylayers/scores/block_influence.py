# SPDX-License-Identifier: Apache-2.0
"""Block influence: how much a block of the base model turns the hidden state.

    s_block = 1 - mean over tokens of cos(hidden before the block, hidden after it)

Source: Men et al.: "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
    2024, arXiv:2403.03853, equation 1.
Differs: meant for removing blocks, used here to choose what to train; padding is left out.
Cost: `mask_batches` forward passes of the base model.
Blind to: the update, and the modules inside a block, which share its score.
"""

from typing import Any

from torch import Tensor, nn

from keylayers.scores.options import Batched
from keylayers.scores.probe import block_layers, layer_values, token_mask
from keylayers.scores.task import ModuleScores, Task


def block_influence(task: Task, options: Batched) -> ModuleScores:
    """The influence of each update's block in the base model."""

    def influence(batch: Any, _: int, before: Tensor, after: Tensor) -> float:
        is_token = token_mask(batch, before)
        pair = before[is_token].float(), after[is_token].float()
        return float(1 - nn.functional.cosine_similarity(*pair, dim=-1).mean())

    with task.masked(options.mask_batches, looks_inside=True) as masked:
        by_block = layer_values(masked, block_layers(task), influence)
        return masked.mean(by_block[:, task.blocks()], unit="1 - cosine")
