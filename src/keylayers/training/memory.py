# SPDX-License-Identifier: Apache-2.0
"""Measure what one step of a trainer holds, module by module, so that a selection can be priced.

Two passes over the batch of the longest examples. One goes forward with everything trainable and
drops whatever autograd would keep, after noting its size and who keeps it: the memory that all
modules would need is never taken. One trains the last block alone, forward and backward, and its
peak shows what a step works with beyond what it keeps.

Not seen: what functions of other libraries keep in places of their own.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Trainer

from keylayers.apply.adapter import trainable_modules
from keylayers.errors import ConfigError
from keylayers.mask.trainer_loss import samples
from keylayers.mask.trainer_state import unchanged_trainer
from keylayers.memory import KeptStorage, ModuleMemory, StepMemory
from keylayers.model_map import ModuleInfo, blocks_of, map_modules, outside_module
from keylayers.preserve import preserved
from keylayers.training.shallow import shallow_backward
from keylayers.updates.adapter import own_parameters, towers_of, tuner_layers

MOMENTS = 2  # AdamW's, of the dtype of what is trained


def measured_memory(trainer: Trainer) -> StepMemory:
    """What a step of `trainer` would hold if only some of its trainable modules were trained.

    Trainer and model are given back as they were. AdamW is taken for the optimiser.

    Args:
        trainer: With every module trainable that a selection may name, by LoRA or as they are.

    Raises:
        ConfigError: the trainer samples its own batches, or trains nothing.
    """
    if samples(trainer):
        raise ConfigError(
            f"memory must be measured on batches of the training data, but "
            f"{type(trainer).__name__} samples its own; give `budget` as a fraction or in x-time"
        )
    model = trainer.model
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
    watch = _Watch(model, infos)
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
            state_bytes=copies * sum(map(_num_bytes, own[info.name])),
            kept=tuple(watch.kept_by[info.name]),
        )
        for info in infos
        if info.name in watch.order
    }
    selectable = {id(one) for parameters in own.values() for one in parameters}
    others = sum(_num_bytes(one) for one in trained if id(one) not in selectable)
    weights = _storage_bytes(trainer) - is_lora * sum(
        _num_bytes(one) for parameters in own.values() for one in parameters
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

    def step() -> None:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, _inputs(trainer, batch))
        loss.backward()

    taken = _peak(trainer.model.device, step)
    trainer.model.zero_grad()
    states = sum(memory.modules[name].state_bytes for name in names)
    bill = memory.bill(names)
    working = taken - (bill.total - memory.fixed_bytes - states)
    return replace(memory, working_bytes=max(0, working), block_bytes=bill.largest_block)


class _Watch:
    """Who keeps what for the backward pass, seen in one forward pass."""

    def __init__(self, model: nn.Module, infos: list[ModuleInfo]) -> None:
        self.model = model
        self.order: dict[str, int] = {}
        self.blocks = {info.name: info.block_index for info in infos}
        self.kept_by: dict[str, list[int]] = {info.name: [] for info in infos}
        self.storages: list[KeptStorage] = []
        self.block_input_bytes = self.num_rows = self.num_tokens = 0
        self._stacked = {info.name for info in infos if info.is_stacked}
        self._layers = _layers(model, infos)
        self._known = {_key(one): -1 for one in (*model.parameters(), *model.buffers())}
        self._block: int | None = None
        self._owner: str | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Inside the block every forward pass is seen, and nothing is kept."""
        with contextlib.ExitStack() as stack:
            for name, layer in self._layers.items():
                stack.callback(layer.register_forward_pre_hook(self._enter(name)).remove)
                stack.callback(layer.register_forward_hook(self._leave, always_call=True).remove)
            for index, block in enumerate(blocks_of(self.model, towers_of(self.model))):
                hook = self._enter_block(index)
                handle = block.register_forward_pre_hook(hook, with_kwargs=True)
                stack.callback(handle.remove)
                stack.callback(block.register_forward_hook(self._leave_block).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._keep, _never))
            yield

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if torch.is_grad_enabled():  # a trainer's reference runs through the same layers
                self.order.setdefault(name, len(self.order))
                # what experts keep inside may be kept whichever of their matrices is trained
                self._owner = None if name in self._stacked else name

        return hook

    def _leave(self, *_: Any) -> None:
        self._owner = None

    def _enter_block(self, index: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._block = index
            hidden = inputs[0] if inputs else named["hidden_states"]
            if hidden.dim() == 3:
                self.num_rows, self.num_tokens = hidden.shape[:2]
            self.block_input_bytes = max(self.block_input_bytes, _num_bytes(hidden))

        return hook

    def _leave_block(self, *_: Any) -> None:
        self._block = None

    def _keep(self, tensor: Tensor) -> None:
        """Note one saved tensor; None takes its place."""
        key = _key(tensor)
        place = self._known.get(key)
        if place is None:
            place = self._known[key] = len(self.storages)
            size = tensor.untyped_storage().nbytes()
            self.storages.append(KeptStorage(size, self._block, -1))
        if place < 0:  # a weight
            return
        if self._owner is not None:
            self.kept_by[self._owner].append(place)
            return
        before = self.storages[place]
        # of the modules that were met so far, the one that would be the lowest at the latest
        latest = len(self.order) - 1
        self.storages[place] = KeptStorage(before.num_bytes, before.block_index, latest)


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


def _never(_: None) -> Tensor:
    raise AssertionError("there is no backward pass")


def _key(tensor: Tensor) -> StorageWeakRef:
    """A storage; the reference keeps its address from being used again, not its memory."""
    return StorageWeakRef(tensor.untyped_storage())


def _trained_modules(model: nn.Module) -> list[ModuleInfo]:
    trained = trainable_modules(model)
    inside = [info for info in map_modules(model, "all") if info.name in trained]
    known = {info.name for info in inside}
    outside = [name for name in tuner_layers(model) if name in trained - known]
    return [*(outside_module(model, name) for name in outside), *inside]


def _layers(model: nn.Module, infos: list[ModuleInfo]) -> dict[str, nn.Module]:
    """Name -> what is called for it: PEFT's layer, the layer itself, or the one of the experts."""
    tuned = tuner_layers(model)
    parts = dict(model.named_modules())
    return {
        info.name: tuned[info.name]
        if info.name in tuned
        else parts[info.name.rpartition(".")[0] if info.is_stacked else info.name]
        for info in infos
    }


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


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _storage_bytes(trainer: Trainer) -> int:
    """Of every weight and buffer, those of a reference model too, each storage once."""
    models = [trainer.model, getattr(trainer, "ref_model", None)]
    held = {
        _key(tensor): tensor.untyped_storage().nbytes()
        for model in models
        if isinstance(model, nn.Module)
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(held.values())


def _peak(device: torch.device, step: Callable[[], None]) -> int:
    """Bytes that `step` holds at most beyond what was held before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _Allocations() as allocations:
        step()
    return allocations.most


class _Allocations(TorchDispatchMode):
    """Bytes of all storages that operations made and that still live, and the most there were.

    For devices without an allocator that counts. What an operation uses inside is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self._held = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = {one.untyped_storage()._cdata for one in _tensors((args, kwargs))}
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
    return [one for one in tree_leaves(values) if isinstance(one, Tensor)]
