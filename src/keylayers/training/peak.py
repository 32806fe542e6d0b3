# SPDX-License-Identifier: Apache-2.0
"""The most bytes that a piece of work holds, on any device."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(device: torch.device, step: Callable[[], None]) -> int:
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
