# SPDX-License-Identifier: Apache-2.0
"""What a scoring method returns: a score for each module, and how it was found."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from keylayers.errors import ModelError
from keylayers.gates import Gates
from keylayers.updates import Update


@dataclass(frozen=True)
class ModuleScores:
    """Scores of modules in model order; higher is more important.

    Attributes:
        module_names: Full names in the base model.
        scores: One for each module; modules that share a gate share the score.
        unit: What a score counts.
        standard_errors: Standard error of each score, from the spread over batches; None if there
            are too few.
        losses: Loss of the masked model at each pass, in nats.
        num_forward: Forward passes over a batch.
        num_backward: Backward passes over a batch, for activations through frozen weights.
        findings: What else the method found, JSON-able, for the record.
        seconds: Wall time; `score_modules` measures it.
    """

    module_names: tuple[str, ...]
    scores: tuple[float, ...]
    _: KW_ONLY
    unit: str
    standard_errors: tuple[float, ...] | None = None
    losses: tuple[float, ...] = field(default=(), repr=False)
    num_forward: int = 0
    num_backward: int = 0
    findings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def forward_equivalents(self) -> int:
        """Cost in forward passes over a batch.

        A backward pass through frozen weights counts as one: like a forward pass, it has one matrix
        product per weight.
        """
        return self.num_forward + self.num_backward


def to_modules(
    gates: Gates, values: Float[Tensor, " gate"], updates: Sequence[Update]
) -> tuple[float, ...]:
    """A value for each update in order, from the gate that it shares."""
    of_module = {
        module: float(value)
        for modules, value in zip(gates.groups.values(), values, strict=True)
        for module in modules
    }
    return tuple(of_module[update.module.name] for update in updates)


def block_indices(updates: Sequence[Update]) -> list[int]:
    """The block of each update's module, for methods that score whole blocks.

    Raises:
        ModelError: a module is in no block.
    """
    outside = [update.module.name for update in updates if update.module.block_index is None]
    if outside:
        raise ModelError(
            f"a method that scores blocks needs every module in a block, but {outside[0]} is in "
            f"none; choose a method that scores modules, such as elimination"
        )
    return [update.module.block_index or 0 for update in updates]
