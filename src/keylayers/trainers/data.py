# SPDX-License-Identifier: Apache-2.0
"""Examples to score on, in the form that the trainer's batches are made from.

TRL's trainers tokenise what they are given when they are built. Other examples are prepared by the
trainer's own code, so that they cannot be read in another way than its training data was.
"""

import inspect
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer

from keylayers.errors import DataError
from keylayers.model.preserve import preserved, to_evaluation
from keylayers.trainers.state import unchanged_trainer

REFERENCE = "ref_"  # columns that trainers compute with their reference model begin so


def prepared_for(trainer: Trainer, dataset: Dataset) -> Dataset:
    """`dataset` with the columns that the trainer reads; itself if it has them all.

    Raises:
        DataError: a column is missing that the trainer cannot make from the others.
    """
    made = dataset
    with unchanged_trainer(trainer):
        missing = _missing(trainer, dataset)
        if missing:
            made = _made(trainer, dataset, missing)
            missing = _missing(trainer, made)
    if missing or len(made) == 0:
        kind = type(trainer).__name__
        what = f"it lacks {', '.join(missing)}" if missing else "no row of it is left"
        raise DataError(
            f"the examples must hold what {kind} reads, but {what}; take rows of "
            f"`trainer.train_dataset`, or prepare others as it prepares its own"
        )
    return made


def _made(trainer: Trainer, dataset: Dataset, missing: list[str]) -> Dataset:
    """What the trainer's own code makes of `dataset`, as far as it can."""
    arguments = _arguments(trainer)
    has_reference = any(name.startswith(REFERENCE) for name in missing)
    with preserved(trainer.model):  # the reference is computed by switching adapters
        to_evaluation(trainer.model)
        if arguments is not None and any(not name.startswith(REFERENCE) for name in missing):
            dataset = _tokenised(trainer, dataset, arguments)
        if has_reference and len(dataset) > 0:
            dataset = _with_reference(trainer, dataset)
    return dataset


def _missing(trainer: Trainer, dataset: Dataset) -> list[str]:
    """Columns of the trainer's data that its batches are made from and `dataset` has not."""
    own = getattr(trainer.train_dataset, "column_names", None)
    if own is None or dataset.column_names is None:
        return []  # a stream tells its columns only when it is read
    read = own
    if trainer.args.remove_unused_columns:
        trainer._set_signature_columns_if_needed()
        read = [name for name in own if name in trainer._signature_columns]
    return [name for name in read if name not in dataset.column_names]


def _arguments(trainer: Trainer) -> dict[str, Any] | None:
    """What the trainer's own preparation is to be called with; None if it has none."""
    if not hasattr(trainer, "_prepare_dataset") or getattr(trainer, "_skip_prepare_dataset", False):
        return None
    known = {
        "processing_class": trainer.processing_class,
        "args": trainer.args,
        "packing": getattr(trainer.args, "packing", False),
        "formatting_func": getattr(trainer, "_formatting_func", None),
        "dataset_name": "mask",  # a name that no trainer treats as its training data
    }
    asked = list(inspect.signature(trainer._prepare_dataset).parameters)[1:]
    return {name: known[name] for name in asked} if set(asked) <= set(known) else None


def _tokenised(trainer: Trainer, dataset: Dataset, arguments: dict[str, Any]) -> Dataset:
    try:
        return trainer._prepare_dataset(dataset, **arguments)
    except KeyError as error:  # what the trainer's code says of a column that is not there
        raise DataError(
            f"the examples must have the columns that {type(trainer).__name__} was given, but "
            f"it lacks {error}; it has {', '.join(dataset.column_names)}"
        ) from error


def _with_reference(trainer: Trainer, dataset: Dataset) -> Dataset:
    """The log-probabilities of the trainer's own reference, as a trainer adds them when built."""
    if not hasattr(trainer, "_precompute_ref_logps"):
        return dataset
    with torch.no_grad():
        return trainer._precompute_ref_logps(
            dataset, "mask", trainer.args.per_device_train_batch_size
        )
