# SPDX-License-Identifier: Apache-2.0
"""LoRA on parameters: the stacked experts of a mixture, or the weight of a linear layer.

PEFT's `target_parameters` add `scaling · B_e A_e` to the parameter while its layer runs. PEFT reads
A and B instead of calling them, so hooks on them do not fire. We wrap the methods that return them
(PEFT 0.21); the gate scales one rank-r factor, not the whole stack.
"""

from jaxtyping import Float
from torch import Tensor

from keylayers.model.sharding import whole
from keylayers.updates.gate import EVERY, Gate, PartGate, ProductUpdate


class ParameterUpdate(ProductUpdate):
    """The LoRA matrices of one parameter."""

    without_examples = EVERY  # the gate scales weights

    def delta(self) -> Float[Tensor, "..."]:
        """The whole update of the parameter in its own shape, in float32."""
        return whole(self.layer.get_delta_weight(self.adapter)).float()

    def connect(self, gate: Gate) -> None:
        """Scale one factor, or the product where PEFT asks for that."""
        factors, product = self.layer.get_delta_factors, self.layer.get_delta_weight

        def gated_factors(adapter: str) -> tuple[Tensor, Tensor, float]:
            left, right, scaling = factors(adapter)
            # Transposed, because a gate of parts acts on the last dimension.
            return left, gate(right.mT).mT if adapter == self.adapter else right, scaling

        def gated_product(adapter: str) -> Tensor:
            if adapter != self.adapter:
                return product(adapter)
            if not isinstance(gate, PartGate):
                return gate(product(adapter))
            left, right, scaling = gated_factors(adapter)
            delta = scaling * left @ right
            if self.layer.num_experts > 1:
                return delta
            # PEFT's product of a single matrix is B A, whatever the order of the factors.
            return delta[0] if self.layer._did_swap_in_out_features else delta[0].mT

        self.layer.get_delta_factors = gated_factors
        self.layer.get_delta_weight = gated_product

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A and B of every expert, and the scaling of their product.

        A part is the j-th singular direction of every expert: PEFT has one rank for all of them.
        """
        left, right, scaling = self.layer.get_delta_factors(self.adapter)
        return right.detach(), left.detach(), scaling

    def stored(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """A and B, laid out as PEFT stacks the experts in them."""
        if not self.layer._did_swap_in_out_features:  # then PEFT's factors are Aᵀ and Bᵀ
            a, b = b.mT, a.mT
        return {
            "lora_A.weight": a.reshape(-1, a.shape[-1]),
            "lora_B.weight": b.permute(1, 2, 0).reshape(b.shape[1], -1),
        }
