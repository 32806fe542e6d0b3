# SPDX-License-Identifier: Apache-2.0
"""A LoRA adapter out of the difference of two checkpoints, by a randomised SVD of each matrix.

One module's difference is in memory at a time (experts that are stored apart need twice that while
they are joined). Scaling is 1, and A and B both have `√σ`.
"""

import math
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from keylayers.apply.trainable import add_lora
from keylayers.errors import ModelError
from keylayers.model.checkpoint import Checkpoint
from keylayers.model.options import ModelOptions, Towers
from keylayers.progress import Progress
from keylayers.updates import adapter_updates, dense_updates
from keylayers.updates.checkpoints import other_differences
from keylayers.updates.gate import ProductUpdate

OVERSAMPLING = 8  # directions beyond the rank, and power iterations: Halko, Martinsson, Tropp 2011
POWER_ITERATIONS = 4
SEED = 0


@torch.no_grad()
def extract_adapter(
    model: PreTrainedModel, tuned: str, rank: int, progress: Progress, towers: Towers = "language"
) -> tuple[PeftModel, dict[str, Any]]:
    """`model` with an adapter of the leading `rank` singular directions of each difference.

    Also what the record says of it; the share of energy is that of the squared norm of all modules'
    differences in these directions. Modules that do not differ have no adapter. Norms, embeddings,
    biases and the head stay those of the base; `progress` gets a note if they differ.
    """
    checkpoint = Checkpoint.open(ModelOptions(model=tuned)).named_as_in(model)
    updates = dense_updates(model, checkpoint, towers)
    factors, kept, whole = {}, 0.0, 0.0
    with progress.stage("singular directions of the difference", len(updates)) as on_step:
        for step, update in enumerate(updates, start=1):
            delta = update.delta()
            energy = float(delta.double().square().sum())
            if not math.isfinite(energy):
                raise ModelError(
                    f"the difference of the checkpoints must be finite, but that of "
                    f"{update.module.name} is not; one of them holds NaN or infinite weights"
                )
            if energy > 0:
                a, b = _leading(delta, rank)
                factors[update.module.name] = (a.cpu(), b.cpu())
                whole += energy
                kept += float(b.double().square().sum(-2).square().sum())
            on_step(step, 1 - kept / whole if whole else 0.0)
    if not factors:
        raise ModelError(
            "the tuned checkpoint must differ from the base in a weight matrix of the model's "
            "blocks, but only biases differ"
        )
    others = other_differences(model, checkpoint, towers)
    if others:
        progress.note(
            f"not extracted, as in the base: {len(others)} other weights that differ "
            f"({', '.join(others[:2])}{', ...' if len(others) > 2 else ''})"
        )
    ranks = {name: a.shape[-2] for name, (a, _) in factors.items()}
    adapted = add_lora(model, ranks, r=rank, lora_alpha=rank)
    for found in adapter_updates(adapted):
        assert isinstance(found, ProductUpdate)
        own = found.stored(*factors[found.module.name])
        found.layer.lora_A[found.adapter].weight.copy_(own["lora_A.weight"])
        found.layer.lora_B[found.adapter].weight.copy_(own["lora_B.weight"])
    progress.note(
        f"rank {rank} of {len(ranks)} modules holds {kept / whole:.1%} of the squared difference"
    )
    record = {"tuned": tuned, "lora_rank": rank, "share_of_energy": kept / whole}
    return adapted, record | {"other_weights_that_differ": others}


def _leading(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of the leading directions of one matrix, or of each in a stack.

    The random sketch has a fixed seed, so the result is reproducible.
    """
    rank = min(rank, *delta.shape[-2:])
    with torch.random.fork_rng(device_type=delta.device.type if delta.is_cuda else "cuda"):
        torch.manual_seed(SEED)
        left, values, right = torch.svd_lowrank(
            delta, q=min(rank + OVERSAMPLING, *delta.shape[-2:]), niter=POWER_ITERATIONS
        )
    root = values[..., None, :rank].sqrt()
    return (right[..., :rank] * root).mT, left[..., :rank] * root
