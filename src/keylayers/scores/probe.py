# SPDX-License-Identifier: Apache-2.0
"""Inputs, outputs and gradients of modules and blocks, seen by hooks while a loss is computed."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from keylayers.model.modules import blocks_of
from keylayers.updates import Update
from keylayers.updates.adapter import towers_of
from keylayers.updates.base_weight import check_linear

SeeInput = Callable[[int, Tensor], None]
SeeGradient = Callable[[int, Tensor, Tensor], None]
SeeBlock = Callable[[int, Tensor, Tensor], None]


@contextlib.contextmanager
def observed_inputs(updates: Sequence[Update], see: SeeInput) -> Iterator[None]:
    """Inside the block, call `see(index, x)` with each module's input, (batch, token, d_in)."""

    def observe(index: int) -> Callable[..., None]:
        layer = updates[index].layer
        active = _active(layer)

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], __: Any) -> None:
            # TRL computes its reference in the same layers, with other adapters active or none.
            if _active(layer) == active:
                see(index, inputs[0].detach())

        return hook

    with contextlib.ExitStack() as stack:
        for index, update in enumerate(updates):
            check_linear(update.layer)
            stack.callback(update.layer.register_forward_hook(observe(index)).remove)
        yield


@contextlib.contextmanager
def observed_gradients(updates: Sequence[Update], see: SeeGradient) -> Iterator[None]:
    """Inside the block, call `see(index, x, grad_y)` with each module's input and ∂L/∂output.

    The gradient of the module's weight is `grad_yᵀ x`, summed over batch and tokens, whether or
    not the weight is trainable or quantised; only one module's is made at a time. The module's
    output must have a graph, which a gate on its update gives it.
    """

    def observe(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                x = inputs[0].detach()
                output.register_hook(lambda grad_y: see(index, x, grad_y))

        return hook

    with contextlib.ExitStack() as stack:
        for index, update in enumerate(updates):
            check_linear(update.layer)
            stack.callback(update.layer.register_forward_hook(observe(index)).remove)
        yield


@contextlib.contextmanager
def observed_blocks(model: nn.Module, see: SeeBlock) -> Iterator[None]:
    """Inside the block, call `see(block_index, input, output)`, both (batch, token, d_model)."""
    tuned = next((one for one in model.modules() if isinstance(one, BaseTunerLayer)), model)
    active = _active(tuned)

    def observe(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            if _active(tuned) != active:
                return
            hidden = inputs[0] if inputs else named["hidden_states"]
            after = output if isinstance(output, Tensor) else output[0]
            see(index, hidden.detach(), after.detach())

        return hook

    with contextlib.ExitStack() as stack:
        for index, block in enumerate(blocks_of(model, towers_of(model))):
            handle = block.register_forward_hook(observe(index), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _active(layer: nn.Module) -> list[str] | None:
    """The adapters that are switched on; None without any."""
    if not isinstance(layer, BaseTunerLayer) or layer.disable_adapters:
        return None
    return list(layer.active_adapters)


def token_mask(batch: Mapping[str, Any], hidden: Float[Tensor, "batch token d"]) -> Tensor:
    """Which positions of `hidden` are tokens and not padding, (batch, token)."""
    mask: Bool[Tensor, "batch token"] = torch.ones(
        hidden.shape[:2], dtype=torch.bool, device=hidden.device
    )
    given = batch.get("attention_mask")
    if isinstance(given, Tensor) and given.shape == mask.shape:
        mask = given.to(hidden.device).bool()
    return mask


def per_example(flat: Float[Tensor, "... d"], batch: Any) -> Float[Tensor, "example token d"]:
    """A module's input or output with a dimension for examples: some models flatten all tokens."""
    if flat.dim() == 3:
        return flat
    rows = len(next(iter(batch.values()))) if isinstance(batch, Mapping) else len(batch)
    return flat.reshape(rows, -1, flat.shape[-1])
