# SPDX-License-Identifier: Apache-2.0
"""What a fine-tune added to each module, and how a gate scales it exactly.

One file for each kind of update: `lora` (PEFT adapters) and `dense` (the difference of two
checkpoints).
"""

from keylayers.updates.dense import DenseUpdate, dense_updates
from keylayers.updates.lora import LoraUpdate, lora_updates

Update = LoraUpdate | DenseUpdate

__all__ = ["DenseUpdate", "LoraUpdate", "Update", "dense_updates", "lora_updates"]
