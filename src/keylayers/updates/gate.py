# SPDX-License-Identifier: Apache-2.0
"""The number that scales an update."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

GATE_CHILD = "keygate"  # the gate's name in the layer; PEFT needs a name without a dot
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
        self.num_calls = 0

    def value(self) -> Float[Tensor, "1"]:
        """γ: the sigmoid of the score, or the score itself."""
        self.num_calls += 1
        return torch.sigmoid(self.score) if self.link == "sigmoid" else self.score

    def forward(self, hidden: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """`γ * hidden`, in the dtype of `hidden`."""
        return hidden * self.value().to(hidden.device, hidden.dtype)
