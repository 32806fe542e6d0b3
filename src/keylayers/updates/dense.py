# SPDX-License-Identifier: Apache-2.0
"""Dense updates: the difference of two checkpoints, `Δθ = θ_t - θ_0`.

The model holds θ_0, and inside the block a module computes `θ_0 x + γ Δθ x`. θ_t is read one module
at a time when it is needed, from memory or from disk, so that a pair of checkpoints needs no more
memory than one model and its largest module. The gate's gradient is `⟨∂L/∂W, Δθ⟩ = Σ_tokens
⟨∂L/∂y, Δθ x⟩`; a custom autograd function computes it from `x` alone, so that neither Δθ nor `Δθ x`
is kept for the backward pass. The two products are added up and not the two weights: in bfloat16
half of a small Δθ would round away in a mixed weight.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from keylayers.errors import ModelError
from keylayers.model.modules import ModuleInfo, experts_of, map_modules
from keylayers.model.options import Towers
from keylayers.updates.gate import GATE_CHILD, Gate


class Workspace:
    """Memory for one Δθ at a time, used again and again: as large as the largest module."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def difference(self, value: Tensor, base: Tensor) -> Tensor:
        """`value - base`, which holds until the next difference is asked for."""
        held, size = self._buffer, base.numel()
        if (held.dtype, held.device) != (base.dtype, base.device) or held.numel() < size:
            self._buffer = torch.empty(base.numel(), dtype=base.dtype, device=base.device)
        out = self._buffer[:size].view(base.shape)
        return torch.sub(value, base.detach(), out=out)


@dataclass(frozen=True)
class DenseUpdate:
    """What full fine-tuning added to one linear layer's weight, and to its bias if it has one."""

    module: ModuleInfo
    layer: nn.Linear | Conv1D
    tuned: Mapping[str, Tensor]
    workspace: Workspace

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """The whole update of the weight, Δθ, in float32."""
        return self._delta_weight().to(torch.float32, copy=True)

    @contextlib.contextmanager
    def gated(self, gate: Gate) -> Iterator[None]:
        """Let the module, which holds θ_0, compute with `θ_0 + γ Δθ` inside the block."""
        is_transposed = not isinstance(self.layer, nn.Linear)  # Conv1D keeps (d_in, d_out)

        def forward(x: Tensor) -> Tensor:
            value = gate.value()
            weight = self.layer.weight.T if is_transposed else self.layer.weight
            y = _GatedLinear.apply(x, value, weight, self._delta_weight)
            if self.layer.bias is None:
                return y
            delta = _difference(self.tuned, f"{self.module.name}.bias", self.layer.bias)
            bias = self.layer.bias + value.to(delta.device) * delta
            return y + bias.to(y.dtype)

        self.layer.add_module(GATE_CHILD, gate)
        self.layer.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self.layer.forward  # the class's own method shows again
            delattr(self.layer, GATE_CHILD)

    def _delta_weight(self) -> Float[Tensor, "d_out d_in"]:
        base = self.layer.weight
        value = _tuned_value(self.tuned, f"{self.module.name}.weight", base)
        delta = self.workspace.difference(value, base)
        return delta if isinstance(self.layer, nn.Linear) else delta.T


@dataclass(frozen=True)
class DenseExpertsUpdate:
    """What full fine-tuning added to the stacked experts of one kind.

    How a mixture uses its parameter is its own affair, so inside the block the mixed weight stands
    in the parameter's place. It is kept for the backward pass: a second copy of the experts.
    """

    module: ModuleInfo
    layer: nn.Module
    tuned: Mapping[str, Tensor]

    def delta(self) -> Float[Tensor, "..."]:
        """The whole update of the parameter, Δθ, in its own shape, in float32."""
        return self._delta().float()

    @contextlib.contextmanager
    def gated(self, gate: Gate) -> Iterator[None]:
        """Let the experts, which hold θ_0, compute with `θ_0 + γ Δθ` inside the block."""
        name = self.module.name.rpartition(".")[2]

        def mix(*_: Any) -> None:
            parameter = self.layer.get_parameter(name)
            self.layer.__dict__[name] = parameter + gate(self._delta())

        def restore(*_: Any) -> None:
            self.layer.__dict__.pop(name, None)  # the parameter shows again

        child = f"{GATE_CHILD}_{name}"  # one layer holds the experts of several kinds
        self.layer.add_module(child, gate)
        handles = [
            self.layer.register_forward_pre_hook(mix),
            self.layer.register_forward_hook(restore, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            restore()
            delattr(self.layer, child)

    def _delta(self) -> Tensor:
        parameter = self.layer.get_parameter(self.module.name.rpartition(".")[2])
        return _difference(self.tuned, self.module.name, parameter)


class _GatedLinear(torch.autograd.Function):
    """`θ_0 x + γ Δ x`, differentiable in `x` and `γ`; Δ is made anew where it is needed."""

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


def dense_updates(
    model: nn.Module, tuned: Mapping[str, Tensor], towers: Towers = "language"
) -> list[DenseUpdate | DenseExpertsUpdate]:
    """The difference between `tuned` and `model` for each module of the blocks, in model order.

    Args:
        model: The base model, θ_0; unchanged.
        tuned: Parameter name -> value after fine-tuning, θ_t, for at least the modules of the
            blocks. It is asked for one value at a time, and again whenever one is needed.
        towers: Which stacks of blocks.

    Raises:
        ModelError: a module is missing in `tuned`, has another shape there, or nothing differs.
    """
    updates: list[DenseUpdate | DenseExpertsUpdate] = []
    workspace = Workspace()
    has_difference = False
    for info in map_modules(model, towers):
        holder, _, parameter = info.name.rpartition(".")
        if parameter in experts_of(model.get_submodule(holder)):
            updates.append(DenseExpertsUpdate(info, model.get_submodule(holder), tuned))
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
            not torch.equal(_tuned_value(tuned, name, value), value)
            for name, value in _parameters(model, info)
        )
    if not has_difference:
        raise ModelError(
            "the tuned checkpoint must differ from the base in the model's blocks, but every "
            "module is equal; is it the same checkpoint?"
        )
    return updates


def module_weights(
    model: nn.Module, towers: Towers = "language", device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """A copy of the weights of all modules of the blocks, by name: θ_0, if taken before training.

    Args:
        model: A model without an adapter.
        towers: Which stacks of blocks.
        device: Where the copy is kept; off the accelerator unless asked otherwise.
    """
    infos = map_modules(model, towers)
    named = [pair for info in infos for pair in _parameters(model, info)]
    return {name: one.detach().to(device, copy=True) for name, one in named}


@contextlib.contextmanager
def back_at_base(
    model: nn.Module, base: Mapping[str, Tensor], towers: Towers = "language"
) -> Iterator[dict[str, Tensor]]:
    """Inside the block the modules hold θ_0 again; yields what they held, θ_t, on the CPU.

    Args:
        model: The tuned model; it holds θ_t again, bit for bit, when the block ends.
        base: θ_0 by name, from `module_weights`; asked for one value at a time.
        towers: Which stacks of blocks.

    Raises:
        ModelError: a module is missing in `base` or has another shape there.
    """
    tuned = module_weights(model, towers)
    parameters = {name: one for name, one in model.named_parameters() if name in tuned}
    try:
        with torch.no_grad():
            for name, one in parameters.items():
                one.copy_(_tuned_value(base, name, one, "the base weights"))
        yield tuned
    finally:
        with torch.no_grad():
            for name, one in parameters.items():
                one.copy_(tuned[name])


def take_other_weights(
    model: nn.Module, tuned: Mapping[str, Tensor], towers: Towers = "language"
) -> list[str]:
    """Give `model` the tuned values of all that is not gated: embeddings, norms, head.

    With them the model with all gates open is the tuned model. The modules of the blocks keep θ_0.

    Returns:
        Names of the parameters whose values differed.

    Raises:
        ModelError: a parameter is missing in `tuned` or has another shape there.
    """
    infos = map_modules(model, towers)
    gated = {name for info in infos for name, _ in _parameters(model, info)}
    changed = []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in gated:
                value = _tuned_value(tuned, name, parameter)
                if not torch.equal(value, parameter):
                    changed.append(name)
                    parameter.copy_(value)
    return changed


def _parameters(model: nn.Module, info: ModuleInfo) -> list[tuple[str, Tensor]]:
    """The parameters of one module by name: the experts' own, or weight and bias."""
    holder, _, last = info.name.rpartition(".")
    if last in experts_of(model.get_submodule(holder)):
        return [(info.name, model.get_parameter(info.name))]
    layer = model.get_submodule(info.name)
    return [(f"{info.name}.{name}", one) for name, one in layer.named_parameters(recurse=False)]


def _difference(tuned: Mapping[str, Tensor], name: str, base: Tensor) -> Tensor:
    """Δθ of one parameter, in the base's dtype and place, in memory of its own."""
    return _tuned_value(tuned, name, base).sub(base.detach())


def _tuned_value(
    weights: Mapping[str, Tensor], name: str, model: Tensor, whose: str = "the tuned checkpoint"
) -> Tensor:
    """The value of one parameter, θ_t or θ_0, in the dtype and place that the model has it in."""
    if name not in weights:
        raise ModelError(f"{whose} must hold {name}, but it does not; is it another kind of model?")
    value = weights[name]
    if value.shape != model.shape:
        raise ModelError(
            f"the two checkpoints must have the same shapes, but {name} is {tuple(model.shape)} in "
            f"the model and {tuple(value.shape)} in {whose}"
        )
    return value.detach().to(model.device, model.dtype)
