# SPDX-License-Identifier: Apache-2.0
"""Measure what one step of a trainer holds, module by module, so that a selection can be priced.

Two passes over the batch of the longest examples. One goes forward with everything trainable and
drops whatever autograd would keep, after noting its size and who keeps it: the memory that all
modules would need is never taken. One trains the last block alone, forward and backward, and its
peak shows what a step works with beyond what it keeps.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import Trainer

from keylayers.apply.adapter import trainable_modules
from keylayers.errors import ConfigError
from keylayers.model.modules import ModuleInfo, map_modules, outside_module
from keylayers.model.preserve import preserved
from keylayers.model.sharding import is_sharded
from keylayers.ranking.memory import ModuleMemory, StepMemory
from keylayers.trainers.batches import samples
from keylayers.trainers.state import unchanged_trainer
from keylayers.training.kept import Watch, num_bytes, storage_key
from keylayers.training.peak import peak_bytes
from keylayers.training.shallow import shallow_backward
from keylayers.updates.adapter import own_parameters, tuner_layers

MOMENTS = 2  # AdamW's, of the dtype of what is trained


def measured_memory(trainer: Trainer) -> StepMemory:
    """What a step of `trainer` would hold if only some of its trainable modules were trained.

    Trainer and model are given back as they were. AdamW is taken for the optimiser.

    Args:
        trainer: With every module trainable that a selection may name, by LoRA or as they are.

    Raises:
        ConfigError: the trainer samples its own batches, trains nothing, or its model is spread
            over processes.
    """
    if samples(trainer):
        raise ConfigError(
            f"memory must be measured on batches of the training data, but "
            f"{type(trainer).__name__} samples its own; give `budget` as a fraction or in x-time"
        )
    model = trainer.model
    if is_sharded(model):
        raise ConfigError(
            "memory must be measured on a model that is whole, but FSDP spreads it over processes; "
            "give `budget` as a fraction or in x-time"
        )
    trained = [one for one in model.parameters() if one.requires_grad]
    infos = _trained_modules(model)
    if not infos:
        raise ConfigError("the trainer must train at least one module, but it trains none")
    with preserved(model), unchanged_trainer(trainer):
        batch = _longest_batch(trainer)
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train()
        return _measured(trainer, batch, infos, trained)


def _measured(
    trainer: Trainer, batch: Any, infos: list[ModuleInfo], trained: list[nn.Parameter]
) -> StepMemory:
    model = trainer.model
    is_checkpointed = _checkpointing(trainer, is_on=False)
    shallow_backward(model)  # like all hooks, gone when the model is given back
    own = {info.name: _own(model, info) for info in infos}
    watch = Watch(model, infos)
    with watch.watching(), trainer.compute_loss_context_manager():
        trainer.compute_loss(model, _inputs(trainer, batch))
    if is_checkpointed:
        _checkpointing(trainer, is_on=True)
        shallow_backward(model)
    is_lora = isinstance(model, PeftModel)
    copies = 1 + MOMENTS + int(is_lora)  # gradient and moments; the matrices, if they are new
    modules = {
        info.name: ModuleMemory(
            order=watch.order[info.name],
            state_bytes=copies * sum(map(num_bytes, own[info.name])),
            kept=tuple(watch.kept_by[info.name]),
        )
        for info in infos
        if info.name in watch.order
    }
    selectable = {id(one) for parameters in own.values() for one in parameters}
    others = sum(num_bytes(one) for one in trained if id(one) not in selectable)
    weights = _storage_bytes(trainer) - is_lora * sum(
        num_bytes(one) for parameters in own.values() for one in parameters
    )
    without_work = StepMemory(
        fixed_bytes=weights + (1 + MOMENTS) * others,
        working_bytes=0,
        modules=modules,
        storages=tuple(watch.storages),
        block_input_bytes=watch.block_input_bytes if is_checkpointed else None,
        block_bytes=0,
        num_rows=watch.num_rows,
        num_tokens=watch.num_tokens,
    )
    return _with_work(without_work, trainer, batch, own, watch.blocks)


def _with_work(
    memory: StepMemory,
    trainer: Trainer,
    batch: Any,
    own: Mapping[str, list[nn.Parameter]],
    blocks: Mapping[str, int | None],
) -> StepMemory:
    """The same with what training the last block takes beyond what it keeps."""
    last = max(memory.modules, key=lambda name: memory.modules[name].order)
    names = [name for name in memory.modules if blocks[name] == blocks[last]]
    for name, parameters in own.items():
        for parameter in parameters:
            parameter.requires_grad_(name in names)

    taken = peak_bytes(trainer.model.device, lambda: _step(trainer, batch))
    trainer.model.zero_grad()
    states = sum(memory.modules[name].state_bytes for name in names)
    bill = memory.bill(names)
    working = taken - (bill.total - memory.fixed_bytes - states)
    return replace(memory, working_bytes=max(0, working), block_bytes=bill.largest_block)


def _checkpointing(trainer: Trainer, *, is_on: bool) -> bool:
    """Switch gradient checkpointing on or off; whether the trainer has it on while it trains."""
    model, args = trainer.model, trainer.args
    if is_on:
        model.activation_checkpointing_enable(args.activation_checkpointing_kwargs)
        return True
    parts = [one for one in model.modules() if getattr(one, "gradient_checkpointing", False)]
    for part in parts:
        part.gradient_checkpointing = False
    return bool(parts) or bool(args.activation_checkpointing)


def _trained_modules(model: nn.Module) -> list[ModuleInfo]:
    trained = trainable_modules(model)
    inside = [info for info in map_modules(model, "all") if info.name in trained]
    known = {info.name for info in inside}
    outside = [name for name in tuner_layers(model) if name in trained - known]
    return [*(outside_module(model, name) for name in outside), *inside]


def _own(model: nn.Module, info: ModuleInfo) -> list[nn.Parameter]:
    """What is trained of one module."""
    tuned = tuner_layers(model)
    if info.name in tuned:
        return own_parameters(tuned[info.name])
    if info.is_stacked:
        return [model.get_parameter(info.name)]
    return list(model.get_submodule(info.name).parameters())


def _longest_batch(trainer: Trainer) -> Any:
    """The trainer's own batch of its longest examples."""
    dataset = trainer.train_dataset
    lengths = [
        sum(len(value) for value in row.values() if isinstance(value, (list, str)))
        for row in dataset
    ]
    longest = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    trainer.train_dataset = dataset.select(longest[: trainer._train_batch_size])
    return next(iter(trainer.get_train_dataloader()))


def _inputs(trainer: Trainer, batch: Any) -> Any:
    return trainer._prepare_inputs(dict(batch))


def _storage_bytes(trainer: Trainer) -> int:
    """Of every weight and buffer, those of a reference model too, each storage once."""
    models = [trainer.model, getattr(trainer, "ref_model", None)]
    held = {
        storage_key(tensor): tensor.untyped_storage().nbytes()
        for model in models
        if isinstance(model, nn.Module)
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(held.values())


def peak_of_step(trainer: Trainer) -> int:
    """Bytes that a step of `trainer` holds at its peak: weights, AdamW's moments, and all else.

    What `measured_memory` foresees, measured on one selection's own trainer. The model is given
    back as it was.
    """
    model = trainer.model
    if is_sharded(model):
        raise ConfigError(
            "memory must be measured on a model that is whole, but FSDP spreads it over processes; "
            "give `budget` as a fraction or in x-time"
        )
    trained = [one for one in model.parameters() if one.requires_grad]
    with preserved(model), unchanged_trainer(trainer):
        batch = _longest_batch(trainer)
        for parameter in trained:
            parameter.requires_grad_(True)
        model.train()
        if _checkpointing(trainer, is_on=False):
            _checkpointing(trainer, is_on=True)
        shallow_backward(model)
        taken = peak_bytes(model.device, lambda: _step(trainer, batch))
    return _storage_bytes(trainer) + MOMENTS * sum(map(num_bytes, trained)) + taken


def _step(trainer: Trainer, batch: Any) -> None:
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, _inputs(trainer, batch))
    loss.backward()
