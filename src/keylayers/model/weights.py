# SPDX-License-Identifier: Apache-2.0
"""The weights that a model holds: of a module, as a hash for records or for guards."""

import hashlib
from collections.abc import Iterable

import torch
from jaxtyping import Float
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from keylayers.errors import ModelError
from keylayers.model.modules import base_model_of, linear_of
from keylayers.model.sharding import own_part, whole

_PIECE = 1 << 18  # entries
_SAME_WIDTH_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes and values in the order given; takes about a second a GB.

    As float32, so that a bfloat16 checkpoint has one hash in whatever dtype it is loaded.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        value = whole(tensor).cpu()
        if value.is_floating_point():
            value = value.to(torch.float32)
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 of the base model's parameters; an adapter around them does not change it."""
    return tensors_sha256(
        (name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter)
        for name, parameter in base_model_of(model).named_parameters()
        if not is_added(name)
    )


def adapter_sha256(model: nn.Module) -> str:
    """SHA-256 of the parameters that PEFT added to the model."""
    parameters = base_model_of(model).named_parameters()
    return tensors_sha256((name, parameter) for name, parameter in parameters if is_added(name))


def is_added(name: str) -> bool:
    """Whether a parameter of a wrapped model was added by PEFT."""
    return any(part in name for part in (".lora_", ".modules_to_save.", ".keygate"))


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """Tensor name -> 64-bit sum of its bit patterns, computed on the tensor's device.

    Any ordinary change of values changes the sum; a permutation of a tensor's entries does not. For
    a sharded tensor, the sum covers this process's part.
    """
    sums = {}
    for name, tensor in tensors:
        bits = own_part(tensor).contiguous().view(_SAME_WIDTH_INT[tensor.element_size()])
        # Piece by piece, because torch copies what it sums to 64 bits. Read from the device last.
        pieces = [piece.sum(dtype=torch.int64) for piece in bits.reshape(-1).split(_PIECE)]
        sums[name] = torch.stack(pieces).sum()
    return {name: int(total) for name, total in sums.items()}


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
