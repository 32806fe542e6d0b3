# SPDX-License-Identifier: Apache-2.0
"""Inputs, outputs and gradients of modules and blocks, seen by hooks while a loss is computed."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from keylayers.model.modules import blocks_of
from keylayers.model.weights import check_linear
from keylayers.scores.task import MaskedModel, Task
from keylayers.updates.adapter import towers_of


def linear_layers(task: Task) -> list[nn.Module]:
    """The layer of each update; raises a ModelError unless all are linear."""
    for update in task.updates:
        check_linear(update.layer)
    return [update.layer for update in task.updates]


def block_layers(task: Task) -> Sequence[nn.Module]:
    """The blocks of the model, in order."""
    return blocks_of(task.trainer.model, towers_of(task.trainer.model))


def layer_values(
    masked: MaskedModel,
    layers: Sequence[nn.Module],
    value: Callable[[Any, int, Tensor, Tensor], float],
    *,
    gates: float = 0.0,
    with_gradient: bool = False,
) -> Float[Tensor, "batch layer"]:
    """`value(batch, index, input, output)` of each layer with the gates at `gates`.

    With gradient, it is given ∂L/∂output instead of the output. The gradient of a layer's weight is
    `grad_yᵀ x`, summed over batch and tokens, even if the weight is frozen or quantised; only one
    such gradient exists at a time. The output has a graph because of the gate on the update.
    """

    def see(row: Tensor, batch: Any, index: int, x: Tensor, y: Tensor) -> None:
        def keep(y: Tensor) -> None:
            row[index] = value(batch, index, x, y)

        if not with_gradient:
            keep(y)
        elif y.requires_grad:
            y.register_hook(keep)

    run = masked.gradient if with_gradient else masked.loss
    values = torch.zeros(len(masked.batches), len(layers))
    for row, batch in zip(values, masked.batches, strict=True):
        with observed(layers, partial(see, row, batch)):
            run(gates, batch)
    return values


@contextlib.contextmanager
def observed(
    layers: Sequence[nn.Module], see: Callable[[int, Tensor, Tensor], None]
) -> Iterator[None]:
    """Inside the block, call `see(index, input, output)`, both (batch, token, d), of each layer."""

    def hook_of(index: int, layer: nn.Module) -> Callable[..., None]:
        tuned = next((part for part in layer.modules() if isinstance(part, BaseTunerLayer)), None)
        active = _active(tuned)

        def hook(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            # TRL computes its reference in the same layers, with other adapters active or none.
            if _active(tuned) == active:
                x = inputs[0] if inputs else named["hidden_states"]
                see(index, x.detach(), output if isinstance(output, Tensor) else output[0])

        return hook

    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            hook = hook_of(index, layer)
            stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _active(layer: BaseTunerLayer | None) -> list[str] | None:
    """Names of the active adapters; None if the layer has none or they are disabled."""
    return None if layer is None or layer.disable_adapters else list(layer.active_adapters)


def tokens_of(batch: Any, x: Float[Tensor, "..."]) -> Float[Tensor, "token d"]:
    """A module's input without padding, as float32."""
    x = per_example(x, batch)
    return x[token_mask(batch, x)].float()


def token_mask(batch: Any, hidden: Float[Tensor, "batch token d"]) -> Bool[Tensor, "batch token"]:
    """Which positions of `hidden` are tokens and not padding."""
    given = batch.get("attention_mask")
    if isinstance(given, Tensor) and given.shape == hidden.shape[:2]:
        return given.to(hidden.device).bool()
    return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)


def per_example(flat: Float[Tensor, "... d"], batch: Any) -> Float[Tensor, "example token d"]:
    """A module's input or output by example; some models flatten the tokens of a batch."""
    if flat.dim() == 3:
        return flat
    rows = len(next(iter(batch.values()))) if isinstance(batch, Mapping) else len(batch)
    return flat.reshape(rows, -1, flat.shape[-1])
