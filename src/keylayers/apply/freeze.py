# SPDX-License-Identifier: Apache-2.0
"""A selection as `requires_grad` flags: full fine-tuning of exactly those modules."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from keylayers.apply.adapter import prove_trainable
from keylayers.errors import GuardError, ModelError
from keylayers.model.modules import map_modules, module_by_name
from keylayers.model.sharding import whole


def train_only(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze every parameter but weight and bias of the modules `names`, and prove it.

    Args:
        model: A transformers model without an adapter; its flags are changed.
        names: Full module names.

    Raises:
        ModelError: a name is no module of the model's blocks.
    """
    known = {info.name for info in map_modules(model, "all")}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ModelError(f"every selected module must be in the model, but {unknown[0]} is not")
    model.requires_grad_(False)
    parameters = dict(model.named_parameters())
    for name in names:
        if name in parameters:  # stacked experts
            parameters[name].requires_grad_(True)
        else:
            module_by_name(model, name).requires_grad_(True)
    prove_trainable(model, names)


def round_to_stored(model: nn.Module, stored: torch.dtype) -> None:
    """Round every weight to the dtype that it will be stored in; its dtype in memory stays."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(stored))


def prove_unchanged_elsewhere(
    model: nn.Module, base: Mapping[str, Tensor], names: Sequence[str]
) -> None:
    """Refuse a model that differs from its base outside the modules `names`.

    Args:
        model: The tuned model, in the dtype that it is stored in.
        base: The base checkpoint's tensors by name.
        names: The modules that were trained.

    Raises:
        GuardError: other weights changed; names the first.
    """
    selected = {f"{name}{kind}" for name in names for kind in ("", ".weight", ".bias")}
    changed = [
        name
        for name, parameter in model.named_parameters()
        if name in base
        and name not in selected
        and not torch.equal(whole(parameter).cpu(), base[name].to(parameter.dtype))
    ]
    if changed:
        raise GuardError(
            f"only selected weights may change, but {len(changed)} others did, first {changed[0]}"
        )
