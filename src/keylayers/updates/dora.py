# SPDX-License-Identifier: Apache-2.0
"""DoRA updates: `m (θ_0 + scaling B A) / ‖θ_0 + scaling B A‖ - θ_0`, gated as a whole.

A gate on A's output, as for LoRA, would also change the norm of the weight. PEFT's magnitude module
computes what DoRA adds to the base layer's output, so the gate scales that. This is exact for any
gate and magnitude, but keeps activations of width d_out.
"""

from jaxtyping import Float
from torch import Tensor

from keylayers.model.sharding import whole
from keylayers.updates.base_weight import base_weight
from keylayers.updates.gate import AdapterUpdate, Gate
from keylayers.updates.lora import scale_output, scaled_product


class DoraUpdate(AdapterUpdate):
    """LoRA matrices and magnitude of one linear layer, without dropout as in `LoraUpdate`."""

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """The formula above in float32."""
        base = base_weight(self.layer)
        direction = base + scaled_product(self)
        magnitude = whole(self.layer.lora_magnitude_vector[self.adapter].weight).float()
        return (magnitude / direction.norm(dim=1))[:, None] * direction - base

    def connect(self, gate: Gate) -> None:
        """Scale what the magnitude module computes."""
        scale_output(self, self.layer.lora_magnitude_vector[self.adapter], gate)
