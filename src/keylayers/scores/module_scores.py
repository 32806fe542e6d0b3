# SPDX-License-Identifier: Apache-2.0
"""What a scoring method gives: one score a module, and how it went."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
        scores: One a module; modules that share a gate share the score.
        standard_errors: Of each score, from the spread over batches; None where there are too few.
        unit: What a score counts.
        losses: Loss of the masked model at each pass, in nats.
        seconds: Wall time.
        num_forward: Forward passes over a batch.
        num_backward: Backward passes over a batch, for activations through frozen weights.
        findings: What else the method found, JSON-able, for the record.
    """

    module_names: tuple[str, ...]
    scores: tuple[float, ...]
    standard_errors: tuple[float, ...] | None
    unit: str
    losses: tuple[float, ...] = field(repr=False)
    seconds: float
    num_forward: int = 0
    num_backward: int = 0
    findings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def forward_equivalents(self) -> int:
        """Cost in forward passes over a batch.

        A backward pass through frozen weights has the matrix products of a forward pass: one for
        each weight. So it counts as one.
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
    outside = [one.module.name for one in updates if one.module.block_index is None]
    if outside:
        raise ModelError(
            f"a method that scores blocks needs every module in one, but {outside[0]} is in none; "
            f"choose one that scores modules, such as elimination"
        )
    return [one.module.block_index or 0 for one in updates]


def data_free(
    updates: Sequence[Update], values: Sequence[float], *, unit: str, seconds: float
) -> ModuleScores:
    """Scores that no batch was needed for."""
    return ModuleScores(
        module_names=tuple(update.module.name for update in updates),
        scores=tuple(values),
        standard_errors=None,
        unit=unit,
        losses=(),
        seconds=seconds,
    )
