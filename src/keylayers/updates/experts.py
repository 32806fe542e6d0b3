# SPDX-License-Identifier: Apache-2.0
"""LoRA on parameters: the stacked experts of a mixture, or the weight of a linear layer.

PEFT's `target_parameters` add `scaling · B_e A_e` to the parameter while its layer runs. PEFT reads
A and B instead of calling them, so hooks on them do not fire. We wrap the methods that return them
(PEFT 0.21); the gate scales one rank-r factor, not the whole stack.
"""

from jaxtyping import Float
from torch import Tensor

from keylayers.model.sharding import whole
from keylayers.updates.gate import AdapterUpdate, Gate


class ParameterUpdate(AdapterUpdate):
    """The LoRA matrices of one parameter."""

    def delta(self) -> Float[Tensor, "..."]:
        """The whole update of the parameter in its own shape, in float32."""
        return whole(self.layer.get_delta_weight(self.adapter)).float()

    def connect(self, gate: Gate) -> None:
        """Scale one factor, or the product where PEFT asks for that."""
        factors, product = self.layer.get_delta_factors, self.layer.get_delta_weight

        def gated_factors(adapter: str) -> tuple[Tensor, Tensor, float]:
            left, right, scaling = factors(adapter)
            return left, gate(right) if adapter == self.adapter else right, scaling

        def gated_product(adapter: str) -> Tensor:
            return gate(product(adapter)) if adapter == self.adapter else product(adapter)

        self.layer.get_delta_factors = gated_factors
        self.layer.get_delta_weight = gated_product
