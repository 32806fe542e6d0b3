# SPDX-License-Identifier: Apache-2.0
"""Block influence: how much a block of the base model turns the hidden state.

    s_block = 1 - mean over tokens of cos(hidden before the block, hidden after it)

Source: Men et al.: "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
    2024, arXiv:2403.03853, equation 1.
Differs: meant for removing blocks, used here to choose what to train; padding is left out.
Cost: `mask_batches` forward passes of the base model.
Blind to: the update, and the modules inside a block, which share its score.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import Trainer

from keylayers.model.modules import blocks_of
from keylayers.options import MaskOptions
from keylayers.progress import OnStep
from keylayers.scores.module_scores import ModuleScores, block_indices
from keylayers.scores.probe import observed_blocks, token_mask
from keylayers.scores.scoring import Scoring, mean_and_error, scoring
from keylayers.updates import Update
from keylayers.updates.adapter import towers_of


def block_influence(
    trainer: Trainer,
    updates: Sequence[Update],
    options: MaskOptions,
    on_step: OnStep | None = None,
) -> ModuleScores:
    """The influence of each update's block in the base model."""
    with scoring(trainer, updates, options, on_step, looks_inside=True) as task:
        influence = torch.stack([_influence(task, batch) for batch in task.batches])
        mean, error = mean_and_error(influence[:, block_indices(updates)])
        return task.result(mean, unit="1 - cosine", standard_errors=error)


def _influence(task: Scoring, batch: Any) -> Float[Tensor, " block"]:
    model = task.source.model
    influence = torch.zeros(len(blocks_of(model, towers_of(model))))

    def see(block: int, before: Tensor, after: Tensor) -> None:
        is_token = token_mask(batch, before)
        pair = before[is_token].float(), after[is_token].float()
        influence[block] = float(1 - nn.functional.cosine_similarity(*pair, dim=-1).mean())

    with observed_blocks(model, see):
        task.loss(0.0, batch)
    return influence
