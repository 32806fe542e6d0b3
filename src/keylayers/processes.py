# SPDX-License-Identifier: Apache-2.0
"""Several processes that share a run, as `accelerate launch` starts them.

Every process does the same work on other batches; only the first writes files and messages. In a
single process these functions return their input.
"""

from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, reduce
from torch import Tensor


def is_one_of_many() -> bool:
    """Whether other processes share this run."""
    return bool(PartialState().use_distributed)


def summed(values: Tensor) -> Tensor:
    """The sum over all processes, on the CPU; `values` is not changed."""
    values = values.detach()
    if is_one_of_many():
        values = reduce(values.to(PartialState().device), reduction="sum")
    return values.cpu()


def from_first(value: Any) -> Any:
    """The first process's `value`, in every process."""
    return broadcast_object_list([value])[0]


def wait_for_all() -> None:
    """Wait until every process has called this."""
    PartialState().wait_for_everyone()
