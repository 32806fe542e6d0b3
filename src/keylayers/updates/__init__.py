# SPDX-License-Identifier: Apache-2.0
"""What a fine-tune added to each module, and how a gate scales it exactly.

One file for each kind of update: `lora`, `dora`, `adalora`, `embedding` and `experts` (PEFT
adapters, sorted out in `adapter`) and `dense` (the difference of two checkpoints).
"""

from keylayers.updates.adalora import AdaLoraUpdate
from keylayers.updates.adapter import adapter_updates
from keylayers.updates.dense import dense_updates
from keylayers.updates.gate import AdapterUpdate, Update

__all__ = ["AdaLoraUpdate", "AdapterUpdate", "Update", "adapter_updates", "dense_updates"]
