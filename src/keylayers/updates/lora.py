# SPDX-License-Identifier: Apache-2.0
"""LoRA updates: `scaling * B A x`, gated on the output of A.

A gate on A's output (tokens × r) is the same function with the same gradient as a gate on B's
output (tokens × d_out), but only rank-r activations are kept for the backward pass: no measurable
memory over a frozen model. It holds for LoRA and rsLoRA, on linear layers, on `Conv1D` and on
quantised ones.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from keylayers.model.modules import ModuleInfo
from keylayers.model.sharding import whole
from keylayers.updates.gate import GATE_CHILD, Gate


@dataclass(frozen=True)
class LoraUpdate:
    """The LoRA matrices of one linear layer, as PEFT holds them."""

    module: ModuleInfo
    layer: LoraLayer
    adapter: str

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """The whole update of the weight, Δθ, in float32."""
        a = whole(self.layer.lora_A[self.adapter].weight).float()
        b = whole(self.layer.lora_B[self.adapter].weight).float()
        return self.layer.scaling[self.adapter] * (b @ a)

    @contextlib.contextmanager
    def gated(self, gate: Gate) -> Iterator[None]:
        """Scale this update by `gate` inside the block; LoRA's dropout is off there."""
        a = self.layer.lora_A[self.adapter]
        with without_dropout(self.layer, self.adapter), gate_output(self.layer, a, gate):
            yield


@contextlib.contextmanager
def without_dropout(layer: LoraLayer, adapter: str) -> Iterator[None]:
    """Inside the block the adapter drops none of its inputs."""
    dropout = layer.lora_dropout[adapter]
    layer.lora_dropout[adapter] = nn.Identity()
    try:
        yield
    finally:
        layer.lora_dropout[adapter] = dropout


def _scale(gate: Gate, _: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return gate(output)


@contextlib.contextmanager
def gate_output(layer: nn.Module, scaled: nn.Module, gate: Gate) -> Iterator[None]:
    """Inside the block `gate`, a child of `layer`, scales what `scaled` computes."""
    layer.add_module(GATE_CHILD, gate)
    handle = scaled.register_forward_hook(partial(_scale, gate))
    try:
        yield
    finally:
        handle.remove()
        delattr(layer, GATE_CHILD)
