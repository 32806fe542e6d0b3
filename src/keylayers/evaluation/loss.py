# SPDX-License-Identifier: Apache-2.0
"""Loss on data that neither training nor mask learning has seen."""

from datasets import Dataset
from transformers import Trainer

from keylayers.mask.trainer_data import prepared_for
from keylayers.mask.trainer_loss import TrainerLoss, batch_losses, every_batch_everywhere


def held_out_loss(trainer: Trainer, dataset: Dataset) -> float:
    """The trainer's own loss on `dataset`: in nats, averaged over all labelled tokens of the set.

    A loss of rows or pairs (DPO, KTO, reward) is averaged over all of these instead. The model runs
    in evaluation mode and gets its mode back; the trainer keeps its metrics.
    """
    source = TrainerLoss(trainer)
    dataset = prepared_for(trainer, dataset)
    with source.quiet(), every_batch_everywhere(trainer):
        return batch_losses(source, list(trainer.get_eval_dataloader(dataset))).mean
