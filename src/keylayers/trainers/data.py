# SPDX-License-Identifier: Apache-2.0
"""The data of anyone's trainer: its training batches, and other examples prepared as its own.

TRL's trainers tokenise and add reference log-probabilities in their constructor only. We call the
same private methods (`_prepare_dataset`, `_precompute_ref_logps`; TRL 1.16) for other examples.
"""

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count, islice
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer

from keylayers.errors import DataError
from keylayers.model.preserve import preserved, to_evaluation, unchanged_trainer

REFERENCE = "ref_"  # prefix of the columns that TRL computes with the reference model


def training_batches(trainer: Trainer, seed: int) -> Iterator[Any]:
    """Training batches without end, shuffled in each epoch by the trainer's own sampler.

    Replaces `trainer.args`: call this inside `TrainerLoss.quiet`.
    """
    if trainer.train_dataset is None:
        raise DataError(
            "the trainer must have a `train_dataset` to learn a mask on, but it has none"
        )
    # Samplers draw by this seed, whether accelerate seeds them or the trainer does.
    trainer.args = copy.copy(trainer.args)
    trainer.args.seed = trainer.args.data_seed = seed
    accelerator = trainer.accelerator
    accelerator.dataloader_config = replace(accelerator.dataloader_config, data_seed=seed)
    generator = torch.Generator().manual_seed(seed)
    dataset, loader = trainer.train_dataset, None
    # TRL's KTO trainer pairs each prompt with its neighbour's answer in the batch: it keeps its
    # data in order, and gets whole batches in another order. Streams have no rows to reorder.
    strategy = getattr(trainer.args, "train_sampling_strategy", "random")
    is_in_order = strategy == "sequential" and isinstance(dataset, Dataset)
    num_repeats = 1
    if samples(trainer):  # the loader repeats prompts, as it uses completions for several steps
        num_repeats = trainer.args.steps_per_generation * getattr(trainer, "num_iterations", 1)
    for epoch in count():
        if loader is None or is_in_order:
            if is_in_order:
                size = trainer._train_batch_size
                trainer.train_dataset = _in_other_blocks(dataset, size, generator)
            loader = trainer.get_train_dataloader()
            trainer.train_dataset = dataset
        if hasattr(loader, "set_epoch"):  # accelerate's loaders need it to reshuffle
            loader.set_epoch(epoch)
        batches = islice(loader, None, None, num_repeats)
        first = next(batches, None)
        if first is None:
            raise DataError("the trainer's data must give at least one batch, but it gives none")
        yield first
        yield from batches


def _in_other_blocks(dataset: Dataset, size: int, generator: torch.Generator) -> Dataset:
    """The rows in blocks of `size` in random order, each block as it was; a shorter one last."""
    num_whole = len(dataset) // size
    blocks = torch.randperm(num_whole, generator=generator).tolist()
    order = [size * block + row for block in blocks for row in range(size)]
    return dataset.select([*order, *range(size * num_whole, len(dataset))])


def samples(trainer: Trainer) -> bool:
    """Whether the trainer learns from completions that it samples and rewards (GRPO, RLOO)."""
    return hasattr(trainer, "reward_funcs")


def own_copy(batch: Any) -> Any:
    """A copy of a batch, a dictionary or a list of examples: trainers pop columns from it."""
    if isinstance(batch, Mapping):
        return dict(batch)
    return [own_copy(example) for example in batch] if isinstance(batch, list) else batch


def give_every_batch(trainer: Trainer) -> None:
    """Let new data loaders give every process all batches, as if it were the only one.

    Sets an attribute of the accelerator, which `unchanged_trainer` restores.
    """
    accelerator = trainer.accelerator

    def prepare(loader: DataLoader[Any], *_: Any, **__: Any) -> Any:
        return prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=accelerator.device_placement,
            dispatch_batches=False,  # otherwise the first process splits the batches of a stream
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
        )

    if accelerator.num_processes > 1:
        accelerator.prepare_data_loader = prepare


def counts_tokens(inputs: Any) -> bool:
    """Whether a batch has a label for each token, over which the loss is a mean, not one a row."""
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return False
    return labels.dim() > 1 and labels.shape[-1] > 1


def loss_unit(inputs: Any) -> str:
    """Unit of the loss of a batch: nats only if it is one of tokens."""
    return "nats per token" if counts_tokens(inputs) else "the trainer's loss"


def num_labels(inputs: Mapping[str, Any]) -> float:
    """How many labelled next tokens a batch holds; without a label for each token, its rows."""
    if counts_tokens(inputs):
        return max(1.0, float((inputs["labels"][..., 1:] != -100).sum()))
    return float(len(next(iter(inputs.values()))))


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
