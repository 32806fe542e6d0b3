# SPDX-License-Identifier: Apache-2.0
"""LoRA on embeddings: `scaling · B A[token]`, gated through the scaling.

PEFT stores A and B as parameters and has no dropout here, so there is no module to hook. While the
layer runs, we replace its scaling by a tensor: PEFT's factor times the gate.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from keylayers.model.modules import ModuleInfo
from keylayers.model.sharding import whole
from keylayers.updates.gate import GATE_CHILD, Gate


@dataclass(frozen=True)
class EmbeddingUpdate:
    """The LoRA matrices of an embedding, as PEFT holds them."""

    module: ModuleInfo
    layer: LoraLayer
    adapter: str

    def delta(self) -> Float[Tensor, "num_embeddings d_model"]:
        """The whole update of the table, Δθ, in float32."""
        a = whole(self.layer.lora_embedding_A[self.adapter]).float()
        b = whole(self.layer.lora_embedding_B[self.adapter]).float()
        return self.layer.scaling[self.adapter] * (b @ a).T

    @contextlib.contextmanager
    def gated(self, gate: Gate) -> Iterator[None]:
        """Scale this update by `gate` inside the block."""
        scaling = self.layer.scaling
        factor = scaling[self.adapter]
        weight = self.layer.lora_embedding_A[self.adapter]

        def scale(*_: Any) -> None:
            scaling[self.adapter] = factor * gate.value().to(weight.device, weight.dtype)

        def restore(*_: Any) -> None:
            scaling[self.adapter] = factor

        layer: nn.Module = self.layer
        layer.add_module(GATE_CHILD, gate)
        handles = [
            layer.register_forward_pre_hook(scale),
            layer.register_forward_hook(restore, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            restore()
            delattr(layer, GATE_CHILD)
