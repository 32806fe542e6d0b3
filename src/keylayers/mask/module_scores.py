# SPDX-License-Identifier: Apache-2.0
"""What a scoring method gives: one score a module, and how it went."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

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
        losses: Loss of the masked model at each step, in nats.
        seconds: Wall time.
        findings: Numbers of the method's own, for the record.
    """

    module_names: tuple[str, ...]
    scores: tuple[float, ...]
    standard_errors: tuple[float, ...] | None
    unit: str
    losses: tuple[float, ...] = field(repr=False)
    seconds: float
    findings: Mapping[str, float] = field(default_factory=dict)


def to_modules(
    gates: Gates, values: Float[Tensor, " gate"], updates: Sequence[Update]
) -> list[float]:
    """A value for each update in order, from the gate that it shares."""
    of_module = {
        module: float(value)
        for modules, value in zip(gates.groups.values(), values, strict=True)
        for module in modules
    }
    return [of_module[update.module.name] for update in updates]
