# SPDX-License-Identifier: Apache-2.0
"""The weight of the base model under an update."""

from jaxtyping import Float
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from keylayers.model_map import linear_of


def base_weight(layer: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """θ_0 of a module in float32, of a quantised one too, as (d_out, d_in) for `Conv1D` too."""
    linear = linear_of(layer)
    weight = linear.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        weight = dequantize_module_weight(linear)
    weight = weight.detach()
    return weight.float() if isinstance(linear, nn.Linear) else weight.T.float()
