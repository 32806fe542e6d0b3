# SPDX-License-Identifier: Apache-2.0
"""Block influence: how much a block of the base model turns the hidden state.

    s_block = 1 - mean over tokens of cos(hidden before the block, hidden after it)

Source: Men et al.: "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
    2024, arXiv:2403.03853, equation 1.
Differs: meant for removing blocks, used here to choose what to train; padding is left out.
Cost: `mask_batches` forward passes of the base model.
Blind to: the update, and the modules inside a block, which share its score.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from keylayers.model.modules import blocks_of
from keylayers.scores.module_scores import ModuleScores, block_indices
from keylayers.scores.options import Batched
from keylayers.scores.probe import observed_blocks, token_mask
from keylayers.scores.task import Task
from keylayers.updates.adapter import towers_of


def block_influence(task: Task, options: Batched) -> ModuleScores:
    """The influence of each update's block in the base model."""
    model = task.trainer.model

    def see(row: Tensor, batch: Any, block: int, before: Tensor, after: Tensor) -> None:
        is_token = token_mask(batch, before)
        pair = before[is_token].float(), after[is_token].float()
        row[block] = float(1 - nn.functional.cosine_similarity(*pair, dim=-1).mean())

    with task.masked(options.mask_batches, looks_inside=True) as masked:
        blocks = block_indices(task.updates)
        influence = torch.zeros(len(masked.batches), len(blocks_of(model, towers_of(model))))
        for row, batch in zip(influence, masked.batches, strict=True):
            with observed_blocks(model, partial(see, row, batch)):
                masked.loss(0.0, batch)
        return masked.mean(influence[:, blocks], unit="1 - cosine")
