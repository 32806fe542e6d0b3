# SPDX-License-Identifier: Apache-2.0
"""Prepare other examples as the trainer prepared its training data.

TRL's trainers tokenise and add reference log-probabilities in their constructor only. We call the
same private methods (`_prepare_dataset`, `_precompute_ref_logps`; TRL 1.16) for other examples.
"""

import inspect
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer

from keylayers.errors import DataError
from keylayers.model.preserve import preserved, to_evaluation
from keylayers.trainers.state import unchanged_trainer

REFERENCE = "ref_"  # prefix of the columns that TRL computes with the reference model


def prepared_for(trainer: Trainer, dataset: Dataset) -> Dataset:
    """`dataset` with the columns that the trainer reads; unchanged if it has all of them."""
    with unchanged_trainer(trainer):
        missing = _missing(trainer, dataset)
        if missing:
            dataset = _prepared(trainer, dataset, missing)
            missing = _missing(trainer, dataset)
    if missing or len(dataset) == 0:
        what = f"it lacks {', '.join(missing)}" if missing else "no row of it is left"
        raise DataError(
            f"the examples must hold what {type(trainer).__name__} reads, but {what}; take rows of "
            f"`trainer.train_dataset`, or prepare other examples in the same way"
        )
    return dataset


def _missing(trainer: Trainer, dataset: Dataset) -> list[str]:
    """Columns that the trainer reads from its training data and `dataset` lacks."""
    own = getattr(trainer.train_dataset, "column_names", None)
    if own is None or dataset.column_names is None:
        return []  # the columns of a stream are unknown until it is read
    if trainer.args.remove_unused_columns:
        trainer._set_signature_columns_if_needed()
        own = [name for name in own if name in trainer._signature_columns]
    return [name for name in own if name not in dataset.column_names]


def _prepared(trainer: Trainer, dataset: Dataset, missing: list[str]) -> Dataset:
    """`dataset` after the trainer's own preparation, which may lack columns still."""
    is_tokenised = all(name.startswith(REFERENCE) for name in missing)
    arguments = None if is_tokenised else _arguments(trainer)
    with preserved(trainer.model), torch.no_grad():  # a reference switches adapters
        to_evaluation(trainer.model)
        if arguments is not None:
            try:
                dataset = trainer._prepare_dataset(dataset, **arguments)
            except KeyError as error:  # TRL reads columns without checking that they exist
                raise DataError(
                    f"the examples must have the columns that {type(trainer).__name__} was given, "
                    f"but it lacks {error}; it has {', '.join(dataset.column_names)}"
                ) from error
        needs_reference = any(name.startswith(REFERENCE) for name in missing) and len(dataset) > 0
        if needs_reference and hasattr(trainer, "_precompute_ref_logps"):
            size = trainer.args.per_device_train_batch_size
            dataset = trainer._precompute_ref_logps(dataset, "mask", size)
    return dataset


def _arguments(trainer: Trainer) -> dict[str, Any] | None:
    """Arguments for the trainer's `_prepare_dataset`; None if it has none that we can call."""
    if not hasattr(trainer, "_prepare_dataset") or getattr(trainer, "_skip_prepare_dataset", False):
        return None
    known = {
        "processing_class": trainer.processing_class,
        "args": trainer.args,
        "packing": getattr(trainer.args, "packing", False),
        "formatting_func": getattr(trainer, "_formatting_func", None),
        "dataset_name": "mask",  # not "train", for which some trainers do more
    }
    asked = list(inspect.signature(trainer._prepare_dataset).parameters)[1:]
    return {name: known[name] for name in asked} if set(asked) <= set(known) else None
