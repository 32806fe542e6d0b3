# SPDX-License-Identifier: Apache-2.0
"""LoRA on embeddings: `scaling · B A[token]`, gated through the scaling.

PEFT stores A and B as parameters and has no dropout here, so there is no module to hook. While the
layer runs, we replace its scaling by a tensor: PEFT's factor times the gate.
"""

from jaxtyping import Float
from torch import Tensor

from keylayers.model.sharding import whole
from keylayers.updates.gate import AdapterUpdate, Gate, around_forward


class EmbeddingUpdate(AdapterUpdate):
    """The LoRA matrices of an embedding."""

    def delta(self) -> Float[Tensor, "num_embeddings d_model"]:
        """`scaling * (B A)^T` in float32."""
        a = whole(self.layer.lora_embedding_A[self.adapter]).float()
        b = whole(self.layer.lora_embedding_B[self.adapter]).float()
        return self.layer.scaling[self.adapter] * (b @ a).T

    def connect(self, gate: Gate) -> None:
        """Scale the scaling."""
        scaling, adapter = self.layer.scaling, self.adapter
        factor, weight = scaling[adapter], self.layer.lora_embedding_A[adapter]

        def scale() -> None:
            scaling[adapter] = factor * gate.value().to(weight.device, weight.dtype)

        def restore() -> None:
            scaling[adapter] = factor

        around_forward(self.layer, scale, restore)
