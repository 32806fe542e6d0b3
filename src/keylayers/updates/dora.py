# SPDX-License-Identifier: Apache-2.0
"""DoRA updates: `m (θ_0 + scaling B A) / ‖θ_0 + scaling B A‖ - θ_0`, gated as a whole.

A gate on A's output, as for LoRA, would also change the norm of the weight. PEFT's magnitude module
computes what DoRA adds to the base layer's output, so the gate scales that. This is exact for any
gate and magnitude, but keeps activations of width d_out. Gates of parts keep the norm of the whole
update, so that the update is linear in them: `Σ_j γ_j c σ_j u_j v_jᵀ + γ_m (c - 1) θ_0`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keylayers.model.sharding import whole
from keylayers.model.weights import base_weight
from keylayers.updates.gate import AdapterUpdate, Gate, PartBasis, PartGate
from keylayers.updates.lora import scale_output


class DoraUpdate(AdapterUpdate):
    """LoRA matrices and magnitude of one linear layer, without dropout as in `LoraUpdate`."""

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """The formula above in float32."""
        base, direction = self._weights()
        return (self._scale()[:, None] * direction - base).float()

    def connect(self, gate: Gate) -> None:
        """Scale what the magnitude module computes, or its parts."""
        magnitude = self.layer.lora_magnitude_vector[self.adapter]
        if not isinstance(gate, PartGate):
            scale_output(self, magnitude, gate)
            return
        self.layer.lora_dropout[self.adapter] = nn.Identity()
        scale = self._scale()

        def forward(x: Tensor, **of_peft: Any) -> Tensor:
            lora_a, lora_b = of_peft["lora_A"], of_peft["lora_B"]
            layer, base = of_peft["base_layer"], of_peft.get("base_result")
            base = layer(x) if base is None else base
            base = base if layer.bias is None else base - layer.bias
            own = scale.to(x.device, x.dtype)
            added = own * lora_b(gate(lora_a(x))) * of_peft["scaling"]
            of_magnitude = gate.value_for(base)[..., -1:].to(x.device, x.dtype)
            return added + of_magnitude * (own - 1) * base

        magnitude.forward = forward

    @cached_property
    def parts(self) -> PartBasis:
        """The rank-one parts of `c B A`, and last what the magnitude does to the base weight.

        `c = m / ‖θ_0 + scaling B A‖` is that of the whole update, whatever parts are closed.
        """
        a, b, scaling = self.factors()
        scale = self._scale().cpu().double()
        basis = PartBasis.of(a, scale[:, None] * b.cpu(), scaling)
        of_magnitude = ((scale - 1)[:, None] * base_weight(self.layer).cpu()).norm()
        return replace(
            basis,
            singular_values=torch.cat([basis.singular_values, of_magnitude[None]]),
            num_parameters=(*basis.num_parameters, len(scale)),
        )

    def cut(self, kept: Sequence[int]) -> dict[str, Tensor]:
        """A, B and the magnitude of the kept parts, of which one at least is a direction."""
        basis, (a, b, scaling) = self.parts, self.factors()
        base, b = base_weight(self.layer).cpu(), b.cpu()
        scale = self._scale().cpu().double()[:, None]
        directions = [index for index in kept if index < len(basis.down)]
        has_magnitude = len(directions) < len(kept)
        new_a, new_b = basis.cut(a, b if has_magnitude else scale * b, scaling, directions)
        norm = (base + new_b @ new_a).norm(dim=1)
        return {
            "lora_A.weight": new_a,
            "lora_B.weight": new_b,
            "lora_magnitude_vector": scale[:, 0] * norm if has_magnitude else norm,
        }

    def _weights(self) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, "d_out d_in"]]:
        """θ_0, and θ_0 + scaling B A."""
        base, (a, b, scaling) = base_weight(self.layer), self.factors()
        return base, base + scaling * (b.to(base.dtype) @ a.to(base.dtype))

    def _scale(self) -> Float[Tensor, " d_out"]:
        magnitude = whole(self.layer.lora_magnitude_vector[self.adapter].weight)
        direction = self._weights()[1]
        return magnitude.to(direction.dtype) / direction.norm(dim=1)
