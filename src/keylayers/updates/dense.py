# SPDX-License-Identifier: Apache-2.0
"""Dense updates: the difference of two checkpoints, `Δθ = θ_t - θ_0`.

Inside the block a module computes `(θ_0 + γ Δθ) x`. The gate's gradient is `⟨∂L/∂W, Δθ⟩ = Σ_tokens
⟨∂L/∂y, Δθ x⟩`; a custom autograd function computes it from `x` alone, so that neither the mixed
weight nor `Δθ x` is kept for the backward pass. The mixed weight of one module at a time exists,
twice a step.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from keylayers.errors import ModelError
from keylayers.model_map import ModuleInfo, linear_of, map_modules, module_by_name
from keylayers.updates.gate import GATE_CHILD, Gate


@dataclass(frozen=True)
class DenseUpdate:
    """What full fine-tuning added to one module's weight, and to its bias if it has one."""

    module: ModuleInfo
    layer: nn.Linear | Conv1D
    delta_weight: Tensor
    delta_bias: Tensor | None

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """The whole update of the weight, Δθ, in float32."""
        is_transposed = not isinstance(self.layer, nn.Linear)
        return (self.delta_weight.T if is_transposed else self.delta_weight).float()

    @contextlib.contextmanager
    def gated(self, gate: Gate) -> Iterator[None]:
        """Let the module, which holds θ_0, compute with `θ_0 + γ Δθ` inside the block."""
        is_transposed = not isinstance(self.layer, nn.Linear)  # Conv1D keeps (d_in, d_out)
        weight = self.layer.weight.T if is_transposed else self.layer.weight
        delta = (self.delta_weight.T if is_transposed else self.delta_weight).to(weight.device)

        def forward(x: Tensor) -> Tensor:
            value = gate.value()
            y = _MixedLinear.apply(x, value, weight, delta)
            if self.layer.bias is None:
                return y
            bias = self.layer.bias
            if self.delta_bias is not None:
                bias = bias + value.to(bias.device) * self.delta_bias.to(bias.device)
            return y + bias.to(y.dtype)

        self.layer.add_module(GATE_CHILD, gate)
        self.layer.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.layer.forward  # the class's own method shows again
            delattr(self.layer, GATE_CHILD)


class _MixedLinear(torch.autograd.Function):
    """`x (θ_0 + γ Δ)ᵀ`, differentiable in `x` and `γ`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "... d_in"],
        gate: Float[Tensor, "1"],
        weight: Float[Tensor, "d_out d_in"],
        delta: Float[Tensor, "d_out d_in"],
    ) -> Float[Tensor, "... d_out"]:
        y = nn.functional.linear(x, _mix(gate, weight, delta))
        ctx.save_for_backward(x, gate)
        ctx.weight, ctx.delta = weight, delta
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, gate = ctx.saved_tensors
        grad_x = grad_gate = None
        if ctx.needs_input_grad[0]:
            mixed = _mix(gate, ctx.weight, ctx.delta).to(grad_y.dtype)
            grad_x = (grad_y @ mixed).to(x.dtype)
        if ctx.needs_input_grad[1]:
            through_delta = grad_y @ ctx.delta.to(grad_y.dtype)
            grad_gate = (through_delta * x).sum(dtype=gate.dtype).reshape(1)
        return grad_x, grad_gate, None, None


def _mix(gate: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
    return torch.addcmul(weight, gate.to(weight.dtype), delta)


def dense_updates(model: nn.Module, tuned: Mapping[str, Tensor]) -> list[DenseUpdate]:
    """The difference between `tuned` and `model` for each module of the blocks, in model order.

    Args:
        model: The base model, θ_0; unchanged.
        tuned: Parameter name -> value after fine-tuning, θ_t, for at least the modules of the
            blocks.

    Raises:
        ModelError: a module is missing in `tuned`, has another shape there, or nothing differs.
    """
    updates = []
    for info in map_modules(model):
        layer = linear_of(module_by_name(model, info.name))
        assert isinstance(layer, (nn.Linear, Conv1D))
        delta_weight = _difference(tuned, f"{info.name}.weight", layer.weight)
        delta_bias = None
        if layer.bias is not None:
            delta_bias = _difference(tuned, f"{info.name}.bias", layer.bias)
        updates.append(DenseUpdate(info, layer, delta_weight, delta_bias))
    if not any(bool(update.delta_weight.any()) for update in updates):
        raise ModelError(
            "the tuned checkpoint must differ from the base in the model's blocks, but every "
            "module is equal; is it the same checkpoint?"
        )
    return updates


def take_other_weights(model: nn.Module, tuned: Mapping[str, Tensor]) -> list[str]:
    """Give `model` the tuned values of all that is not gated: embeddings, norms, head.

    With them the model with all gates open is the tuned model. The modules of the blocks keep θ_0.

    Returns:
        Names of the parameters whose values differed.

    Raises:
        ModelError: a parameter is missing in `tuned` or has another shape there.
    """
    gated = {f"{info.name}.{kind}" for info in map_modules(model) for kind in ("weight", "bias")}
    changed = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in gated:
                difference = _difference(tuned, name, parameter)
                if bool(difference.any()):
                    changed.append(name)
                    parameter.copy_(tuned[name])
    return changed


def _difference(tuned: Mapping[str, Tensor], name: str, base: Tensor) -> Tensor:
    if name not in tuned:
        raise ModelError(
            f"the tuned checkpoint must hold {name}, but it does not; is it another kind of model?"
        )
    value = tuned[name]
    if value.shape != base.shape:
        raise ModelError(
            f"the two checkpoints must have the same shapes, but {name} is {tuple(base.shape)} in "
            f"the base and {tuple(value.shape)} in the tuned one"
        )
    return value.to(base.device, base.dtype) - base.detach()
