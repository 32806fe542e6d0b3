# SPDX-License-Identifier: Apache-2.0
"""LoRA updates: `scaling * B A x`, gated on the output of A.

A gate on A's output (tokens × r) is the same function with the same gradient as a gate on B's
output (tokens × d_out), but only rank-r activations are kept for the backward pass: no measurable
memory over a frozen model. It holds for LoRA and rsLoRA, on linear layers, on `Conv1D` and on
quantised ones.
"""

from jaxtyping import Float
from torch import Tensor, nn

from keylayers.updates.gate import AdapterUpdate, Gate, ProductUpdate


class LoraUpdate(ProductUpdate):
    """The LoRA matrices of one linear layer. LoRA's dropout is off while a gate is connected."""

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """`scaling * B A` in float32."""
        a, b, scaling = self.factors()
        return scaling * (b.float() @ a.float())

    def connect(self, gate: Gate) -> None:
        """Scale the output of A."""
        scale_output(self, self.layer.lora_A[self.adapter], gate)


def scale_output(update: AdapterUpdate, part: nn.Module, gate: Gate) -> None:
    """Scale what `part` of the update's layer computes, without dropout on its inputs."""
    update.layer.lora_dropout[update.adapter] = nn.Identity()
    part.register_forward_hook(lambda _, __, output: gate(output))
