# SPDX-License-Identifier: Apache-2.0
"""The number that scales an update, and what every kind of update offers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from keylayers.model.modules import ModuleInfo

Link = Literal["sigmoid", "identity"]


class Gate(nn.Module):
    """A number that scales one module's update, or those of a group of modules.

    `score` has shape (1,), because FSDP2 refuses scalar parameters
    (https://github.com/pytorch/pytorch/issues/130810), and is float32 (float64 in a float64 model),
    because small steps are lost to rounding in bfloat16.
    """

    def __init__(self, score: float, link: Link, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.full((1,), score, dtype=dtype))
        self.link = link

    def value(self) -> Float[Tensor, "1"]:
        """γ: the sigmoid of the score, or the score itself."""
        return torch.sigmoid(self.score) if self.link == "sigmoid" else self.score

    def forward(self, hidden: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """`γ * hidden`, in the dtype of `hidden`."""
        return hidden * self.value().to(hidden.device, hidden.dtype)


@dataclass(frozen=True)
class Update(ABC):
    """What a fine-tune added to one module; `layer` computes with it."""

    module: ModuleInfo
    layer: nn.Module

    @abstractmethod
    def delta(self) -> Float[Tensor, "..."]:
        """The whole update, Δθ, in float32: (d_out, d_in), or as an embedding or experts store it.

        Of a weight with a bias, the update of the weight.
        """

    @abstractmethod
    def connect(self, gate: Gate) -> None:
        """Let the layer compute with `gate` times the update.

        Changes only attributes of modules (hooks, children, methods), which `preserved` restores.
        """


@dataclass(frozen=True)
class AdapterUpdate(Update):
    """An update that a PEFT layer holds for one adapter."""

    layer: LoraLayer
    adapter: str


def around_forward(layer: nn.Module, before: Callable[[], None], after: Callable[[], None]) -> None:
    """Call `before` and `after` around every forward pass of `layer`, even one that fails."""
    layer.register_forward_pre_hook(lambda *_: before())
    layer.register_forward_hook(lambda *_: after(), always_call=True)
