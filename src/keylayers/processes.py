# SPDX-License-Identifier: Apache-2.0
"""Several processes at work on one run, as `accelerate launch` starts them.

Every process does the same on other batches, and only the first writes and speaks. With one
process nothing here does anything.
"""

from typing import Any

import torch
from torch import Tensor, distributed


def is_one_of_many() -> bool:
    """Whether other processes are at work on the same run."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, on the CPU; `values` themselves are left as they are."""
    if not is_one_of_many():
        return values.detach().cpu()
    total = values.detach().clone().to(_device())
    distributed.all_reduce(total)
    return total.cpu()


def from_first(value: Any) -> Any:
    """What the first process has there, in every process."""
    if not is_one_of_many():
        return value
    held = [value]
    distributed.broadcast_object_list(held, src=0, device=_device())
    return held[0]


def wait_for_all() -> None:
    """Go on when every process has come here."""
    if is_one_of_many():
        distributed.barrier()


def _device() -> torch.device:
    """Where the processes exchange tensors: NCCL and its like only know accelerators."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or "gloo" in str(distributed.get_backend()):
        return torch.device("cpu")
    return accelerator
