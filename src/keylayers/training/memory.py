# SPDX-License-Identifier: Apache-2.0
"""Measures what a training step holds when only some of a trainer's modules are trained.

Each measurement is a real step of the trainer, forward and backward, on the batch of its longest
examples. The peak counts weights, gradients, activations kept for the backward pass, temporary
memory of operations, and AdamW's two moments, which the step itself does not make.
"""

import weakref
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer

from keylayers.apply.trainable import trainable_modules
from keylayers.errors import ConfigError, RankingError
from keylayers.model.modules import map_modules
from keylayers.model.preserve import preserved, unchanged_trainer
from keylayers.model.sharding import is_sharded
from keylayers.ranking.selection import StepMemory
from keylayers.trainers.data import samples
from keylayers.training.shallow import shallow_backward
from keylayers.updates.adapter import own_parameters, tuner_layers

MOMENTS = 2  # AdamW's, in the dtype of the trained parameters


def measured_memory(trainer: Trainer) -> StepMemory:
    """Measures steps of `trainer` for `ranking.select("12GiB", memory)`.

    Trainer and model are the same after a measurement as before.

    Args:
        trainer: Trains every module that a selection may name, by LoRA or in full. AdamW is
            assumed as the optimizer.

    Raises:
        ConfigError: the trainer samples its own batches or trains nothing, or its model is sharded
            over processes.
    """
    what = ""
    if samples(trainer):
        what = f"batches of the training data, but {type(trainer).__name__} samples its own"
    elif is_sharded(trainer.model):
        what = "a whole model, but FSDP shards it over processes"
    if what:
        raise ConfigError(
            f"memory must be measured on {what}; give `budget` as a fraction or in x-time"
        )
    return _MeasuredMemory(trainer)


class _MeasuredMemory:
    """What a step of one trainer holds at its peak; each set of modules is measured once."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._own = _trained_modules(trainer.model)
        if not self._own:
            raise ConfigError("the trainer must train at least one module, but it trains none")
        self._measured = cache(self._measure)
        with unchanged_trainer(trainer):
            self._batch = _longest_batch(trainer)
        tokens = next(value for value in self._batch.values() if getattr(value, "ndim", 0) == 2)
        self.batch = f"{tokens.shape[0]} x {tokens.shape[1]} tokens"

    def of(self, names: Collection[str]) -> float:
        """Bytes at the peak of a step that trains these modules; infinite if it does not fit."""
        unknown = [name for name in names if name not in self._own]
        if unknown or not names:
            what = unknown[0] if unknown else "none"
            raise RankingError(
                f"memory must be measured for modules that the trainer trains, got {what}"
            )
        return self._measured(frozenset(names))

    def _measure(self, names: frozenset[str]) -> float:
        trainer, model = self._trainer, self._trainer.model
        others = {id(weight) for name in self._own.keys() - names for weight in self._own[name]}
        wanted = [weight for weight in model.parameters() if weight.requires_grad]
        trained = [weight for weight in wanted if id(weight) not in others]
        with preserved(model), unchanged_trainer(trainer):
            model.train()
            for weight in trained:
                weight.requires_grad_(True)
            if trainer.args.activation_checkpointing:  # trainers only switch it on in train()
                model.activation_checkpointing_enable(trainer.args.activation_checkpointing_kwargs)
            shallow_backward(model)  # a hook: gone when the model is given back
            try:
                taken = peak_bytes(model.device, self._step)
            except torch.OutOfMemoryError:
                return float("inf")
        absent = others if isinstance(model, PeftModel) else set()  # LoRA that would not exist
        moments = MOMENTS * sum(weight.nbytes for weight in trained)
        return float(_stored_bytes(trainer, absent) + moments + taken)

    def _step(self) -> None:
        trainer = self._trainer
        with trainer.compute_loss_context_manager():
            inputs = trainer._prepare_inputs(dict(self._batch))
            loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()


def _trained_modules(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The parameters of each trained module, without heads and norms."""
    trained, layers = trainable_modules(model), tuner_layers(model)
    if layers:
        return {name: own_parameters(layer) for name, layer in layers.items() if name in trained}
    known = (info.name for info in map_modules(model, "all"))
    return {name: trained[name] for name in known if name in trained}


def _longest_batch(trainer: Trainer) -> Any:
    """The batch that the trainer makes of its longest examples."""
    dataset = trainer.train_dataset
    lengths = [
        sum(len(value) for value in row.values() if isinstance(value, (list, str)))
        for row in dataset
    ]
    longest = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    trainer.train_dataset = dataset.select(longest[: trainer._train_batch_size])
    return next(iter(trainer.get_train_dataloader()))


def _stored_bytes(trainer: Trainer, absent: set[int]) -> int:
    """Bytes of all weights and buffers, including a reference model's; each storage counts once."""
    models = [trainer.model, getattr(trainer, "ref_model", None)]
    held = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for model in models
        if isinstance(model, nn.Module)
        for tensor in (*model.parameters(), *model.buffers())
        if id(tensor) not in absent
    }
    return sum(held.values())


def peak_bytes(device: torch.device, step: Callable[[], None]) -> int:
    """The most bytes that `step` holds in addition to what was held before."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        step()
        torch.accelerator.synchronize(device)
        return int(torch.accelerator.max_memory_allocated(device) - before)
    with _Allocations() as allocations:
        step()
    return allocations.most


class _Allocations(TorchDispatchMode):
    """Counts the bytes of living storages that operations made, and their maximum.

    For CPUs, whose allocator does not count. It misses memory that an operation uses internally.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self._held = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        made = operation(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if storage._cdata not in given | self._known:
                self._known.add(storage._cdata)
                self._held += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self._held)
        return made

    def _free(self, address: int, num_bytes: int) -> None:
        self._known.discard(address)
        self._held -= num_bytes


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]
