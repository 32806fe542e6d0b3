# SPDX-License-Identifier: Apache-2.0
"""LoRA on parameters: the stacked experts of a mixture, or the weight of a linear layer.

PEFT's `target_parameters` add `scaling · B_e A_e` to the parameter while its layer runs. PEFT reads
A and B instead of calling them, so hooks on them do not fire. We wrap the methods that return them
(PEFT 0.21); the gate scales one rank-r factor, not the whole stack.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from keylayers.model.modules import ModuleInfo
from keylayers.model.sharding import whole
from keylayers.updates.gate import GATE_CHILD, Gate


@dataclass(frozen=True)
class ParameterUpdate:
    """The LoRA matrices of one parameter, as PEFT holds them."""

    module: ModuleInfo
    layer: ParamWrapper
    adapter: str

    def delta(self) -> Float[Tensor, "..."]:
        """The whole update of the parameter, Δθ, in its own shape, in float32."""
        return whole(self.layer.get_delta_weight(self.adapter)).float()

    @contextlib.contextmanager
    def gated(self, gate: Gate) -> Iterator[None]:
        """Scale this update by `gate` inside the block."""
        factors, whole = self.layer.get_delta_factors, self.layer.get_delta_weight

        def gated_factors(adapter: str) -> tuple[Tensor, Tensor, float]:
            left, right, scaling = factors(adapter)
            return left, gate(right) if adapter == self.adapter else right, scaling

        def gated_whole(adapter: str) -> Tensor:
            return gate(whole(adapter)) if adapter == self.adapter else whole(adapter)

        self.layer.add_module(GATE_CHILD, gate)
        self.layer.get_delta_factors = gated_factors
        self.layer.get_delta_weight = gated_whole
        try:
            yield
        finally:
            del self.layer.get_delta_factors, self.layer.get_delta_weight
            delattr(self.layer, GATE_CHILD)
