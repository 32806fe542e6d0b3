# SPDX-License-Identifier: Apache-2.0
"""DoRA updates: `m (θ_0 + scaling B A) / ‖θ_0 + scaling B A‖ - θ_0`, gated as a whole.

A gate on A's output, as for LoRA, would also change the norm of the weight. PEFT's magnitude module
computes what DoRA adds to the base layer's output, so the gate scales that. This is exact for any
gate and magnitude, but keeps activations of width d_out.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor

from keylayers.model.modules import ModuleInfo
from keylayers.model.sharding import whole
from keylayers.updates.base_weight import base_weight
from keylayers.updates.gate import Gate
from keylayers.updates.lora import gate_output, without_dropout


@dataclass(frozen=True)
class DoraUpdate:
    """LoRA matrices and magnitude of one linear layer, as PEFT holds them."""

    module: ModuleInfo
    layer: LoraLayer
    adapter: str

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """The whole update of the weight, Δθ, in float32."""
        a = whole(self.layer.lora_A[self.adapter].weight).float()
        b = whole(self.layer.lora_B[self.adapter].weight).float()
        base = base_weight(self.layer)
        direction = base + self.layer.scaling[self.adapter] * (b @ a)
        magnitude = whole(self.layer.lora_magnitude_vector[self.adapter].weight).float()
        return (magnitude / direction.norm(dim=1))[:, None] * direction - base

    @contextlib.contextmanager
    def gated(self, gate: Gate) -> Iterator[None]:
        """Scale this update by `gate` inside the block; DoRA's dropout is off there."""
        magnitude = self.layer.lora_magnitude_vector[self.adapter]
        with (
            without_dropout(self.layer, self.adapter),
            gate_output(self.layer, magnitude, gate),
        ):
            yield
