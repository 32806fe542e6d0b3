# SPDX-License-Identifier: Apache-2.0
"""Which weights a model holds: a hash for records, and a quick fingerprint for guards."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from keylayers.model_map import base_model_of

_SAME_WIDTH_INT = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of the base model's parameters, in hexadecimal.

    Values are taken as float32, so that a bfloat16 checkpoint has one hash whether it is loaded as bfloat16
    or as float32. PEFT's own parameters are left out. Reads every weight once on the CPU, about a second a GB.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(base_model_of(model).named_parameters()):
        name = name.replace(".base_layer.", ".")
        if ".lora_" in name or ".modules_to_save." in name or ".keygate." in name:
            continue
        name = name.replace(".original_module.", ".")
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        value = parameter.detach()
        if value.is_floating_point():
            value = value.to("cpu", torch.float32)
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """For each tensor the 64-bit sum of its bit patterns, computed where the tensor lives.

    One pass over memory without a copy. Any ordinary change of values changes the sum; a mere permutation of
    a tensor's entries would not.
    """
    sums = {}
    for name, tensor in tensors:
        bits = tensor.detach().contiguous().view(_SAME_WIDTH_INT[tensor.element_size()])
        sums[name] = bits.sum(dtype=torch.int64)
    return {name: int(total) for name, total in sums.items()}
