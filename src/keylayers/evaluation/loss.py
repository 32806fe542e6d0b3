# SPDX-License-Identifier: Apache-2.0
"""Loss on data that neither training nor mask learning has seen, over all or example by example."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, Trainer

from keylayers.data.chat import IGNORED
from keylayers.progress import OnStep
from keylayers.trainers.data import prepared_for
from keylayers.trainers.loss import TrainerLoss

Tokens: TypeAlias = tuple[list[int], list[int]]  # `input_ids` and `labels`, not shifted


def held_out_loss(trainer: Trainer, dataset: Dataset) -> float:
    """The trainer's own loss on `dataset`: in nats, averaged over all labelled tokens of the set.

    A loss of rows or pairs (DPO, KTO, reward) is averaged over all of these instead. The model runs
    in evaluation mode and gets its mode back; the trainer keeps its metrics.
    """
    source = TrainerLoss(trainer, sees_every_batch=True)
    dataset = prepared_for(trainer, dataset)
    with source.quiet():
        return source.held_out(list(trainer.get_eval_dataloader(dataset))).mean


def example_losses(
    model: PreTrainedModel | PeftModel,
    examples: Sequence[Tokens],
    *,
    batch_size: int,
    on_step: OnStep,
) -> list[tuple[float, int]]:
    """The loss of each example in nats, summed over its labelled tokens, and the number of these.

    The model runs as it is; it should be in evaluation mode.
    """
    # The longest first: what does not fit into memory shows at once, and little is padding.
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index][0]))
    found: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
    for step, start in enumerate(range(0, len(order), batch_size), start=1):
        chosen = order[start : start + batch_size]
        losses = _batch([examples[index] for index in chosen], model)
        for index, loss in zip(chosen, losses, strict=True):
            found[index] = loss
        on_step(step, sum(nats for nats, _ in losses) / max(1, sum(num for _, num in losses)))
    return found


@torch.no_grad()
def _batch(
    examples: Sequence[Tokens], model: PreTrainedModel | PeftModel
) -> list[tuple[float, int]]:
    # Padded on the right, where nothing looks.
    rows = [torch.tensor(tokens) for tokens, _ in examples]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = pad_sequence(
        [torch.tensor(label) for _, label in examples], batch_first=True, padding_value=IGNORED
    )
    logits = model(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
    ).logits[:, :-1]
    wanted = labels[:, 1:].to(logits.device)
    nats = cross_entropy(
        logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(wanted)
    counts = (wanted != IGNORED).sum(dim=1).tolist()
    return list(zip(nats.double().sum(dim=1).tolist(), counts, strict=True))
