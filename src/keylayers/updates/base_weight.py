# SPDX-License-Identifier: Apache-2.0
"""The weight of the base model under an update."""

import torch
from jaxtyping import Float
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from keylayers.errors import ModelError
from keylayers.model.modules import linear_of
from keylayers.model.sharding import whole


def base_weight(layer: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """θ_0 of a module as (d_out, d_in), also if quantised or a `Conv1D`; float32, or float64."""
    check_linear(layer)
    linear = linear_of(layer)
    weight = linear.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        weight = dequantize_module_weight(linear)
    weight = whole(weight)
    weight = weight if weight.dtype == torch.float64 else weight.float()
    return weight if isinstance(linear, nn.Linear) else weight.T


def check_linear(layer: nn.Module) -> None:
    """Raise a ModelError unless the layer is a matrix product."""
    linear = linear_of(layer)
    if not isinstance(linear, (nn.Linear, Conv1D)):
        raise ModelError(
            f"this method looks at the inputs or weights of linear layers, but the adapter also "
            f"updates a {type(linear).__name__}; choose one that looks at losses, such as "
            f"elimination"
        )
