# SPDX-License-Identifier: Apache-2.0
"""What a fine-tune added to each module, and how a gate scales it exactly.

One file for each kind of update: `lora`, `dora`, `adalora`, `embedding` and `experts` (PEFT
adapters, sorted out in `adapter`) and `dense` (the difference of two checkpoints).
"""

from keylayers.updates.adalora import AdaLoraUpdate
from keylayers.updates.adapter import AdapterUpdate, adapter_updates
from keylayers.updates.dense import DenseUpdate, dense_updates
from keylayers.updates.dense_experts import DenseExpertsUpdate
from keylayers.updates.dora import DoraUpdate
from keylayers.updates.embedding import EmbeddingUpdate
from keylayers.updates.experts import ParameterUpdate
from keylayers.updates.lora import LoraUpdate

Update = AdapterUpdate | DenseUpdate | DenseExpertsUpdate

__all__ = [
    "AdaLoraUpdate",
    "AdapterUpdate",
    "DenseExpertsUpdate",
    "DenseUpdate",
    "DoraUpdate",
    "EmbeddingUpdate",
    "LoraUpdate",
    "ParameterUpdate",
    "Update",
    "adapter_updates",
    "dense_updates",
]
