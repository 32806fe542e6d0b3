# SPDX-License-Identifier: Apache-2.0
"""Several processes that share a run, as `accelerate launch` starts them.

Every process does the same work on other batches; only the first writes files and messages. In a
single process these functions return their input.
"""

from typing import Any

import torch
from torch import Tensor, distributed


def is_one_of_many() -> bool:
    """Whether other processes share this run."""
    is_started = distributed.is_available() and distributed.is_initialized()
    return is_started and distributed.get_world_size() > 1


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, on the CPU; `values` is not changed."""
    if not is_one_of_many():
        return values.detach().cpu()
    total = values.detach().clone().to(_device())
    distributed.all_reduce(total)
    return total.cpu()


def from_first(value: Any) -> Any:
    """The first process's `value`, in every process."""
    if not is_one_of_many():
        return value
    shared = [value]
    distributed.broadcast_object_list(shared, src=0, device=_device())
    return shared[0]


def wait_for_all() -> None:
    """Wait until every process has called this."""
    if is_one_of_many():
        distributed.barrier()


def _device() -> torch.device:
    """Where processes exchange tensors; backends such as NCCL only know accelerators."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or "gloo" in str(distributed.get_backend()):
        return torch.device("cpu")
    return accelerator
