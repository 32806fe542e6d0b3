# SPDX-License-Identifier: Apache-2.0
"""What a fine-tune added to each module, and how a gate scales it exactly.

One file for each kind of update: `lora`, `dora`, `adalora`, `embedding` and `experts` (PEFT
adapters, sorted out in `adapter`) and `dense` (the difference of two checkpoints).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn

from keylayers.updates.adalora import AdaLoraUpdate as AdaLoraUpdate
from keylayers.updates.adapter import adapter_updates as adapter_updates
from keylayers.updates.checkpoints import back_at_base
from keylayers.updates.dense import dense_updates as dense_updates
from keylayers.updates.gate import AdapterUpdate as AdapterUpdate
from keylayers.updates.gate import Update as Update

ZERO = "the update of every module is zero: no score says anything about this fine-tune"


def are_zero(updates: Sequence[Update]) -> bool:
    """Whether no update changes its module, as before the first step; ends at the first change."""
    return not any(bool(update.delta().any()) for update in updates)


@contextmanager
def trained_updates(
    model: nn.Module, base_weights: Mapping[str, Tensor] | None
) -> Iterator[Sequence[Update]]:
    """The updates of a trained model, inside the block: of its adapter, or from `base_weights`."""
    with nullcontext() if base_weights is None else back_at_base(model, base_weights) as tuned:
        yield adapter_updates(model) if tuned is None else dense_updates(model, tuned)
