# SPDX-License-Identifier: Apache-2.0
"""Dense updates: the difference of two checkpoints, `Δθ = θ_t - θ_0`.

The model holds θ_0, and with a gate a module computes `θ_0 x + γ Δθ x`. θ_t is read one module at
a time when it is needed, from memory or from disk, so that a pair of checkpoints needs no more
memory than one model and its largest module. The gate's gradient is `⟨∂L/∂W, Δθ⟩ = Σ_tokens
⟨∂L/∂y, Δθ x⟩`; a custom autograd function computes it from `x` alone, so that neither Δθ nor `Δθ x`
is kept for the backward pass. It adds the two products instead of mixing the two weights, because
in bfloat16 half of a small Δθ would round away in a mixed weight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from keylayers.errors import ModelError
from keylayers.model.modules import map_modules
from keylayers.model.options import Towers
from keylayers.updates.checkpoints import difference_of, parameters_of, value_like
from keylayers.updates.gate import EVERY, Gate, Update, cover_in_forward


class Workspace:
    """A buffer for a single Δθ, as large as the largest module."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def difference(self, value: Tensor, base: Tensor) -> Tensor:
        """`value - base`; the next call overwrites it."""
        held, size = self._buffer, base.numel()
        if (held.dtype, held.device) != (base.dtype, base.device) or held.numel() < size:
            self._buffer = torch.empty(size, dtype=base.dtype, device=base.device)
        return torch.sub(value, base.detach(), out=self._buffer[:size].view(base.shape))


@dataclass(frozen=True)
class DenseUpdate(Update):
    """What full fine-tuning added to one linear layer's weight, and to its bias if it has one."""

    without_examples = EVERY  # the gate's gradient is summed over the tokens as they come

    layer: nn.Linear | Conv1D
    tuned: Mapping[str, Tensor]
    workspace: Workspace

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """The update of the weight in float32."""
        return self._delta_weight().to(torch.float32, copy=True)

    def connect(self, gate: Gate) -> None:
        """Let the module, which holds θ_0, compute with `θ_0 + γ Δθ`."""
        is_transposed = not isinstance(self.layer, nn.Linear)  # Conv1D keeps (d_in, d_out)

        def forward(x: Tensor) -> Tensor:
            value = gate.value()
            weight = self.layer.weight.T if is_transposed else self.layer.weight
            y = _GatedLinear.apply(x, value, weight, self._delta_weight)
            if self.layer.bias is None:
                return y
            delta = difference_of(self.tuned, f"{self.module.name}.bias", self.layer.bias)
            bias = self.layer.bias + value.to(delta.device) * delta
            return y + bias.to(y.dtype)

        self.layer.forward = forward  # type: ignore[method-assign]

    def _delta_weight(self) -> Float[Tensor, "d_out d_in"]:
        base = self.layer.weight
        value = value_like(self.tuned, f"{self.module.name}.weight", base)
        delta = self.workspace.difference(value, base)
        return delta if isinstance(self.layer, nn.Linear) else delta.T


class _GatedLinear(torch.autograd.Function):
    """`θ_0 x + γ Δ x`, differentiable in `x` and `γ`; Δ is recomputed in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Float[Tensor, "... d_in"],
        gate: Float[Tensor, "1"],
        weight: Float[Tensor, "d_out d_in"],
        make_delta: Callable[[], Float[Tensor, "d_out d_in"]],
    ) -> Float[Tensor, "... d_out"]:
        ctx.save_for_backward(x, gate)
        ctx.weight, ctx.make_delta = weight, make_delta
        y = nn.functional.linear(x, weight)
        return y.add_(nn.functional.linear(x, make_delta()) * gate.to(y.dtype))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, gate = ctx.saved_tensors
        grad_x = grad_gate = None
        through_delta = grad_y @ ctx.make_delta().to(grad_y.dtype)
        if ctx.needs_input_grad[1]:
            grad_gate = (through_delta * x).sum(dtype=gate.dtype).reshape(1)
        if ctx.needs_input_grad[0]:
            grad_x = grad_y @ ctx.weight.to(grad_y.dtype)
            grad_x = grad_x.add_(through_delta * gate.to(grad_x.dtype)).to(x.dtype)
        return grad_x, grad_gate, None, None


@dataclass(frozen=True)
class DenseExpertsUpdate(Update):
    """What full fine-tuning added to one parameter that stacks the experts of a mixture.

    Architectures use the parameter in different ways, so the mixed weight replaces it during the
    forward pass. Autograd keeps the mixed weight: a second copy of the experts in memory.
    """

    without_examples = EVERY  # the gate scales weights

    tuned: Mapping[str, Tensor]

    def delta(self) -> Float[Tensor, "..."]:
        """The update of the parameter in its own shape, in float32."""
        return difference_of(self.tuned, self.module.name, self._parameter()).float()

    def connect(self, gate: Gate) -> None:
        """Let the experts, which hold θ_0, compute with `θ_0 + γ Δθ`."""

        def mixed() -> Tensor:
            base = self._parameter()
            return base + gate(difference_of(self.tuned, self.module.name, base))

        cover_in_forward(self.layer, self.module.last_name, mixed)

    def _parameter(self) -> nn.Parameter:
        return self.layer.get_parameter(self.module.last_name)


def dense_updates(
    model: nn.Module, tuned: Mapping[str, Tensor], towers: Towers = "language"
) -> list[Update]:
    """The difference between `tuned` and `model` for each module of the blocks, in model order.

    `tuned` has θ_t by parameter name, for at least these modules. Its values are read one at a
    time, each time they are needed.
    """
    updates: list[Update] = []
    workspace = Workspace()
    has_difference = False
    for info in map_modules(model, towers):
        if info.is_stacked:
            holder = model.get_submodule(info.name.rpartition(".")[0])
            updates.append(DenseExpertsUpdate(info, holder, tuned))
        else:
            layer = model.get_submodule(info.name)
            assert isinstance(layer, (nn.Linear, Conv1D))
            if not layer.weight.is_floating_point():
                raise ModelError(
                    f"the difference of two checkpoints needs a base that is not quantised, but "
                    f"{info.name} holds packed {layer.weight.dtype}"
                )
            updates.append(DenseUpdate(info, layer, tuned, workspace))
        has_difference |= any(
            not torch.equal(value_like(tuned, name, value), value)
            for name, value in parameters_of(model, info)
        )
    if not has_difference:
        raise ModelError(
            "the tuned checkpoint must differ from the base in the model's blocks, but every "
            "module is equal; is it the same checkpoint?"
        )
    return updates
