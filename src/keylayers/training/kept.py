# SPDX-License-Identifier: Apache-2.0
"""Which module or block keeps what for the backward pass, seen in one forward pass that keeps none.

Not seen: what functions of other libraries keep in places of their own.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from keylayers.model.modules import ModuleInfo, blocks_of
from keylayers.ranking.memory import KeptStorage
from keylayers.updates.adapter import towers_of, tuner_layers


class Watch:
    """What one forward pass would keep.

    Attributes:
        order: Module name -> when the pass met it, counted over all modules.
        blocks: Module name -> block.
        kept_by: Module name -> places in `storages` of what it keeps itself.
        storages: Everything that is kept.
        block_input_bytes: Of the largest input of a block.
        num_rows: Rows of the batch.
        num_tokens: Positions in each.
    """

    def __init__(self, model: nn.Module, infos: list[ModuleInfo]) -> None:
        self.model = model
        self.order: dict[str, int] = {}
        self.blocks = {info.name: info.block_index for info in infos}
        self.kept_by: dict[str, list[int]] = {info.name: [] for info in infos}
        self.storages: list[KeptStorage] = []
        self.block_input_bytes = self.num_rows = self.num_tokens = 0
        self._stacked = {info.name for info in infos if info.is_stacked}
        self._layers = _layers(model, infos)
        self._known = {storage_key(one): -1 for one in (*model.parameters(), *model.buffers())}
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
            self.block_input_bytes = max(self.block_input_bytes, num_bytes(hidden))

        return hook

    def _leave_block(self, *_: Any) -> None:
        self._block = None

    def _keep(self, tensor: Tensor) -> None:
        """Note one saved tensor; None takes its place."""
        key = storage_key(tensor)
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


def _never(_: None) -> Tensor:
    raise AssertionError("there is no backward pass")


def storage_key(tensor: Tensor) -> StorageWeakRef:
    """A storage; the reference keeps its address from being used again, not its memory."""
    return StorageWeakRef(tensor.untyped_storage())


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


def num_bytes(tensor: Tensor) -> int:
    """Of the values of a tensor."""
    return tensor.numel() * tensor.element_size()
