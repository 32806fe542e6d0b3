# SPDX-License-Identifier: Apache-2.0
"""Which weights a model holds: a hash for records, and a quick fingerprint for guards."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from keylayers.model.modules import base_model_of
from keylayers.model.sharding import own_part, whole

_PIECE = 1 << 18  # entries
_SAME_WIDTH_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes and values, in the order given, in hexadecimal.

    Floating-point values are taken as float32, so that a bfloat16 checkpoint has one hash whether
    it is loaded as bfloat16 or as float32. Reads every value once on the CPU, about a second a GB.
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
    """The hash of the base model's parameters, the same with and without an adapter around them."""
    return tensors_sha256(
        (name.replace(".base_layer.", ".").replace(".original_module.", "."), parameter)
        for name, parameter in base_model_of(model).named_parameters()
        if not is_added(name)
    )


def adapter_sha256(model: nn.Module) -> str:
    """The hash of what PEFT added to the model."""
    parameters = base_model_of(model).named_parameters()
    return tensors_sha256((name, parameter) for name, parameter in parameters if is_added(name))


def is_added(name: str) -> bool:
    """Whether a parameter of a wrapped model is PEFT's, not the base model's."""
    return any(part in name for part in (".lora_", ".modules_to_save.", ".keygate"))


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """For each tensor the 64-bit sum of its bit patterns, computed where the tensor lives.

    One pass over memory, piece by piece, for a sum in 64 bits first makes a wider copy of what it
    adds up. Any ordinary change of values changes the sum; a mere permutation of a tensor's entries
    would not. Of a tensor that is spread over processes it is that of this one's part.
    """
    sums = {}
    for name, tensor in tensors:
        bits = own_part(tensor).contiguous().view(_SAME_WIDTH_INT[tensor.element_size()])
        pieces = bits.reshape(-1).split(_PIECE)
        sums[name] = sum((one.sum(dtype=torch.int64) for one in pieces), torch.zeros(()).long())
    return {name: int(total) for name, total in sums.items()}
