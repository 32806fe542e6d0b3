# SPDX-License-Identifier: Apache-2.0
"""CKA: how much a block of the base model changes the geometry of a set of examples.

    s_block = 1 - CKA(X, Y),   CKA = ‖Yᵀ X‖_F² / (‖Xᵀ X‖_F ‖Yᵀ Y‖_F)

    X, Y: hidden states of each example's last token before and after the block, centred.

Source: Ando Ogawa et al.: "Layer-wise LoRA fine-tuning: a similarity metric approach", 2026,
    arXiv:2602.05988; linear CKA: Kornblith, Norouzi, Lee, Hinton: "Similarity of Neural Network
    Representations Revisited", ICML 2019, arXiv:1905.00414, equation 3.
Differs: the examples of `mask_batches` batches; no interval, because CKA is not a mean over
    examples. If all examples end with the same token, the first block's input does not vary and its
    CKA counts as 0.
Cost: `mask_batches` forward passes of the base model.
Blind to: the update, and the modules inside a block, which share its score. With fewer examples
    than hidden dimensions CKA is biased upwards, in all blocks alike.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from keylayers.scores.options import Batched
from keylayers.scores.probe import block_layers, observed, token_mask
from keylayers.scores.task import ModuleScores, Task


def cka(task: Task, options: Batched) -> ModuleScores:
    """1 - CKA over each update's block in the base model."""
    blocks = block_layers(task)
    pairs: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in blocks]

    def see(block: int, before: Tensor, after: Tensor) -> None:
        last = token_mask(batch, before).long().cumsum(dim=1).argmax(dim=1)
        rows = torch.arange(len(before), device=before.device)
        for held, hidden in zip(pairs[block], (before, after), strict=True):
            held.append(hidden[rows, last].float().cpu())

    with task.masked(options.mask_batches, looks_inside=True) as masked:
        with observed(blocks, see):
            for batch in masked.batches:
                masked.loss(0.0, batch)
        change = torch.tensor([1 - linear_cka(torch.cat(x), torch.cat(y)) for x, y in pairs])
        return masked.result(change[task.blocks()], unit="1 - CKA")


def linear_cka(x: Float[Tensor, "example d"], y: Float[Tensor, "example e"]) -> float:
    """Linear centred kernel alignment of two sets, in [0, 1]; 0 if one of them does not vary."""
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    sizes = (x.T @ x).norm() * (y.T @ y).norm()
    return float((y.T @ x).norm() ** 2 / sizes) if sizes > 0 else 0.0
