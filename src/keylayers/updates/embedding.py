# SPDX-License-Identifier: Apache-2.0
"""LoRA on embeddings: `scaling · B A[token]`, gated on `A[token]`.

PEFT stores A and B as parameters and has no dropout here, so there is no module to hook. We wrap
the method that looks up tokens in A (`_embed` of PEFT 0.21).
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from keylayers.model.sharding import whole
from keylayers.updates.gate import Gate, ProductUpdate


class EmbeddingUpdate(ProductUpdate):
    """The LoRA matrices of an embedding."""

    def delta(self) -> Float[Tensor, "num_embeddings d_model"]:
        """`scaling * (B A)^T` in float32."""
        a, b, scaling = self.factors()
        return scaling * (b.float() @ a.float()).T

    def connect(self, gate: Gate) -> None:
        """Scale what A gives for the tokens."""
        embed, own = self.layer._embed, self.layer.lora_embedding_A[self.adapter]

        def gated_embed(tokens: Tensor, weight: Tensor, *args: Any, **named: Any) -> Tensor:
            found: Tensor = embed(tokens, weight, *args, **named)
            is_own = weight.data_ptr() == own.data_ptr()  # a view; other adapters have none
            return gate(found) if is_own else found

        self.layer._embed = gated_embed

    def stored(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """A and B under the names of embeddings."""
        return {"lora_embedding_A": a, "lora_embedding_B": b}

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A (r, num_embeddings), B (d_model, r) and the scaling of their product."""
        layer, name = self.layer, self.adapter
        a, b = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
        return whole(a), whole(b), layer.scaling[name]
