# SPDX-License-Identifier: Apache-2.0
"""Inputs, outputs and gradients of modules and blocks, seen by hooks while a loss is computed."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from keylayers.model.modules import blocks_of
from keylayers.scores.task import MaskedModel
from keylayers.updates import Update
from keylayers.updates.adapter import towers_of
from keylayers.updates.base_weight import check_linear

Hook = Callable[..., None]
SeeInput = Callable[[int, Tensor], None]
SeePair = Callable[[int, Tensor, Tensor], None]


def input_values(
    masked: MaskedModel,
    updates: Sequence[Update],
    value: Callable[[Update, Float[Tensor, "token d_in"]], float],
    *,
    gates: float,
) -> Float[Tensor, "batch module"]:
    """`value(update, tokens)` of each module's inputs, without padding, gates at `gates`."""

    def see(row: Tensor, batch: Any, index: int, x: Tensor) -> None:
        x = per_example(x, batch)
        row[index] = value(updates[index], x[token_mask(batch, x)].float())

    values = torch.zeros(len(masked.batches), len(updates))
    for row, batch in zip(values, masked.batches, strict=True):
        with observed_inputs(updates, partial(see, row, batch)):
            masked.loss(gates, batch)
    return values


def gradient_values(
    masked: MaskedModel, updates: Sequence[Update], value: Callable[[Any, Tensor, Tensor], float]
) -> Float[Tensor, "batch module"]:
    """`value(batch, x, grad_y)` of each module's input and ∂L/∂output in the base model."""

    def see(row: Tensor, batch: Any, index: int, x: Tensor, grad_y: Tensor) -> None:
        row[index] = value(batch, x, grad_y)

    values = torch.zeros(len(masked.batches), len(updates))
    for row, batch in zip(values, masked.batches, strict=True):
        with observed_gradients(updates, partial(see, row, batch)):
            masked.gradient(0.0, batch)
    return values


@contextlib.contextmanager
def observed_inputs(updates: Sequence[Update], see: SeeInput) -> Iterator[None]:
    """Inside the block, call `see(index, x)` with each module's input, (batch, token, d_in)."""

    def observe(index: int, layer: nn.Module) -> Hook:
        active = _active(layer)

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], __: dict[str, Any], ___: Any) -> None:
            # TRL computes its reference in the same layers, with other adapters active or none.
            if _active(layer) == active:
                see(index, inputs[0].detach())

        return hook

    with _hooked(_linear_layers(updates), observe):
        yield


@contextlib.contextmanager
def observed_gradients(updates: Sequence[Update], see: SeePair) -> Iterator[None]:
    """Inside the block, call `see(index, x, grad_y)` with each module's input and ∂L/∂output.

    The gradient of the module's weight is `grad_yᵀ x`, summed over batch and tokens, even if the
    weight is frozen or quantised; only one such gradient exists at a time. The module's output must
    have a graph, which a gate on its update gives it.
    """

    def observe(index: int, _: nn.Module) -> Hook:
        def hook(
            _: nn.Module, inputs: tuple[Tensor, ...], __: dict[str, Any], output: Tensor
        ) -> None:
            if output.requires_grad:
                x = inputs[0].detach()
                output.register_hook(lambda grad_y: see(index, x, grad_y))

        return hook

    with _hooked(_linear_layers(updates), observe):
        yield


@contextlib.contextmanager
def observed_blocks(model: nn.Module, see: SeePair) -> Iterator[None]:
    """Inside the block, call `see(block_index, input, output)`, both (batch, token, d_model)."""
    tuned = next((layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)), model)
    active = _active(tuned)

    def observe(index: int, _: nn.Module) -> Hook:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            if _active(tuned) != active:  # TRL's reference pass, as in `observed_inputs`
                return
            hidden = inputs[0] if inputs else named["hidden_states"]
            after = output if isinstance(output, Tensor) else output[0]
            see(index, hidden.detach(), after.detach())

        return hook

    with _hooked(blocks_of(model, towers_of(model)), observe):
        yield


@contextlib.contextmanager
def _hooked(
    layers: Iterable[nn.Module], observe: Callable[[int, nn.Module], Hook]
) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            hook = observe(index, layer)
            stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _linear_layers(updates: Sequence[Update]) -> list[nn.Module]:
    for update in updates:
        check_linear(update.layer)
    return [update.layer for update in updates]


def _active(layer: nn.Module) -> list[str] | None:
    """Names of the active adapters; None if the layer has none or they are disabled."""
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
    """A module's input or output by example; some models flatten the tokens of a batch."""
    if flat.dim() == 3:
        return flat
    rows = len(next(iter(batch.values()))) if isinstance(batch, Mapping) else len(batch)
    return flat.reshape(rows, -1, flat.shape[-1])
