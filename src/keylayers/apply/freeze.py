# SPDX-License-Identifier: Apache-2.0
"""A selection as `requires_grad` flags: full fine-tuning of exactly those modules."""

from collections.abc import Sequence

from torch import nn

from keylayers.apply.adapter import prove_trainable
from keylayers.errors import ModelError
from keylayers.model_map import map_modules, module_by_name


def train_only(model: nn.Module, names: Sequence[str]) -> None:
    """Freeze every parameter but weight and bias of the modules `names`, and prove it.

    Args:
        model: A transformers model without an adapter; its flags are changed.
        names: Full module names.

    Raises:
        ModelError: a name is no module of the model's blocks.
    """
    known = {info.name for info in map_modules(model)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ModelError(f"every selected module must be in the model, but {unknown[0]} is not")
    model.requires_grad_(False)
    for name in names:
        module_by_name(model, name).requires_grad_(True)
    prove_trainable(model, names)
