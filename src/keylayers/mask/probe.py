# SPDX-License-Identifier: Apache-2.0
"""What flows through modules and blocks while a loss is computed: inputs, outputs, gradients.

Only passes that the loss is differentiated through are seen: not those of a reference model, nor
those that sample completions. `Scoring.look` and `Scoring.gradient` tell them apart.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from keylayers.model_map import blocks_of
from keylayers.updates import Update

SeeInput = Callable[[int, Tensor], None]
SeeGradient = Callable[[int, Tensor, Tensor], None]
SeeBlock = Callable[[int, Tensor, Tensor], None]


@contextlib.contextmanager
def observed_inputs(updates: Sequence[Update], see: SeeInput) -> Iterator[None]:
    """Inside the block, call `see(index, x)` with each module's input, (batch, token, d_in)."""

    def observe(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], __: Any) -> None:
            if torch.is_grad_enabled():
                see(index, inputs[0].detach())

        return hook

    with contextlib.ExitStack() as stack:
        for index, update in enumerate(updates):
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
            stack.callback(update.layer.register_forward_hook(observe(index)).remove)
        yield


@contextlib.contextmanager
def observed_blocks(model: nn.Module, see: SeeBlock) -> Iterator[None]:
    """Inside the block, call `see(block_index, input, output)`, both (batch, token, d_model)."""

    def observe(index: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            if not torch.is_grad_enabled():
                return
            hidden = inputs[0] if inputs else named["hidden_states"]
            after = output if isinstance(output, Tensor) else output[0]
            see(index, hidden.detach(), after.detach())

        return hook

    with contextlib.ExitStack() as stack:
        for index, block in enumerate(blocks_of(model)):
            handle = block.register_forward_hook(observe(index), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def observed_padding(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Gives a function that says which positions of (batch, token, d) are tokens, not padding.

    It knows the mask that the model was called with last, whatever the trainer's batches hold.
    """
    last: dict[str, Any] = {}

    def hook(_: nn.Module, __: tuple[Any, ...], named: dict[str, Any]) -> None:
        last["attention_mask"] = named.get("attention_mask")

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield lambda hidden: token_mask(last, hidden)
    finally:
        handle.remove()


def token_mask(batch: Mapping[str, Any], hidden: Float[Tensor, "batch token d"]) -> Tensor:
    """Which positions of `hidden` are tokens and not padding, (batch, token)."""
    mask: Bool[Tensor, "batch token"] = torch.ones(
        hidden.shape[:2], dtype=torch.bool, device=hidden.device
    )
    given = batch.get("attention_mask")
    if isinstance(given, Tensor) and given.shape == mask.shape:
        mask = given.to(hidden.device).bool()
    return mask
