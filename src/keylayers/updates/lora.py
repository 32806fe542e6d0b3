# SPDX-License-Identifier: Apache-2.0
"""LoRA updates: `scaling * B A x`, gated on the output of A.

A gate on A's output (tokens × r) is the same function with the same gradient as a gate on B's
output (tokens × d_out), but only rank-r activations are kept for the backward pass: no measurable
memory over a frozen model.

Refused, because a gate on A would silently be wrong: DoRA (A also enters the norm), AdaLoRA (A is
no module), `lora_bias` (B's bias is not scaled), `target_parameters` and merged adapters.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from keylayers.errors import ModelError
from keylayers.model_map import ModuleInfo, base_model_of, map_modules
from keylayers.updates.gate import GATE_CHILD, Gate


@dataclass(frozen=True)
class LoraUpdate:
    """The LoRA matrices of one module, as PEFT holds them."""

    module: ModuleInfo
    layer: LoraLayer
    adapter: str

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """The whole update of the weight, Δθ, in float32."""
        a = self.layer.lora_A[self.adapter].weight.detach().float()
        b = self.layer.lora_B[self.adapter].weight.detach().float()
        return self.layer.scaling[self.adapter] * (b @ a)

    @contextlib.contextmanager
    def gated(self, gate: Gate) -> Iterator[None]:
        """Scale this update by `gate` inside the block; LoRA's dropout is off there."""

        def scale(_: nn.Module, __: tuple[Tensor, ...], hidden: Tensor) -> Tensor:
            return gate(hidden)

        dropout = self.layer.lora_dropout[self.adapter]
        self.layer.add_module(GATE_CHILD, gate)
        self.layer.lora_dropout[self.adapter] = nn.Identity()
        handle = self.layer.lora_A[self.adapter].register_forward_hook(scale)
        try:
            yield
        finally:
            handle.remove()
            self.layer.lora_dropout[self.adapter] = dropout
            delattr(self.layer, GATE_CHILD)


def lora_updates(model: nn.Module) -> list[LoraUpdate]:
    """The updates of the active adapter on the modules of the model's blocks, in model order.

    Raises:
        ModelError: no PEFT adapter, several active ones, or a kind that a gate cannot scale
            exactly.
    """
    if not isinstance(model, PeftModel):
        raise ModelError(
            f"the model must carry a PEFT adapter, got a plain {type(model).__name__}; fine-tune "
            f"it with LoRA, or give the tuned checkpoint as `tuned`"
        )
    updates = []
    for info in map_modules(model):
        layer = base_model_of(model).get_submodule(info.name)
        if isinstance(layer, BaseTunerLayer):
            updates.append(LoraUpdate(info, *_checked(layer, info.name)))
    if not updates:
        raise ModelError(
            "the adapter must update at least one linear module inside the model's blocks, but it "
            "updates none"
        )
    return updates


def ungated_tuner_layers(model: nn.Module) -> list[str]:
    """PEFT layers outside the blocks (embeddings, head): not gated, their update stays on."""
    inside = {info.name for info in map_modules(model)}
    return [
        name
        for name, layer in base_model_of(model).named_modules()
        if isinstance(layer, BaseTunerLayer) and name not in inside
    ]


def _checked(layer: BaseTunerLayer, name: str) -> tuple[LoraLayer, str]:
    """The layer and its one active adapter, or a ModelError that says what a gate cannot scale."""
    if len(layer.active_adapters) != 1:
        raise ModelError(
            f"exactly one adapter must be active, but {name} has {layer.active_adapters}; choose "
            f"one with model.set_adapter(name)"
        )
    adapter = layer.active_adapters[0]
    reason = None
    if not isinstance(layer, LoraLayer):
        reason = f"a {type(layer).__name__} is no LoRA layer"
    elif layer.merged:
        reason = "it is merged into the base weights; call model.unmerge_adapter() first"
    elif not isinstance(layer.lora_A, nn.ModuleDict) or adapter not in layer.lora_A:
        reason = f"A is no module in a {type(layer).__name__} (as in target_parameters)"
    elif layer.use_dora.get(adapter, False):
        reason = "DoRA's A also enters the norm of the weight"
    elif layer.lora_bias.get(adapter, False):
        reason = "`lora_bias=True` adds a bias that a gate on A does not scale"
    if reason is not None:
        raise ModelError(
            f"a gate must scale the whole update, which it cannot for {name}: {reason}"
        )
    assert isinstance(layer, LoraLayer)
    return layer, adapter
