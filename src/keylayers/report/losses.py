# SPDX-License-Identifier: Apache-2.0
"""The loss curves that a ranking's record holds. Needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import is_number


@dataclass(frozen=True)
class LossCurves:
    """Losses by step.

    Attributes:
        stages: Title -> loss of each step, from step 1.
        held_out: ("base" or "tuned", loss), where it is known.
        unit: What a loss counts.
    """

    stages: Mapping[str, Sequence[float]]
    held_out: Sequence[tuple[str, float]]
    unit: str


def loss_curves(ranking: Ranking) -> LossCurves | None:
    """What the record holds of them; None if there is no curve."""
    made_by = ranking.provenance
    stages = {"stage 1, training": _numbers(made_by.get("stage_1", {}).get("losses"))}
    mask = made_by.get("mask", {})
    if "learning_rate" in mask:  # otherwise each loss is one of another mask
        losses = _numbers(mask.get("losses"))
        stages["stage 2, learning the scores"] = losses
    stages = {title: losses for title, losses in stages.items() if len(losses) > 1}
    if not stages:
        return None
    held_out = made_by.get("held_out_loss_nats", {})
    known = [(name, float(held_out[name])) for name in ("base", "tuned") if name in held_out]
    return LossCurves(stages, known, str(made_by.get("loss_unit", "nats per token")))


def _numbers(values: Any) -> list[float]:
    """The values, if they are finite numbers."""
    is_usable = isinstance(values, list) and all(is_number(value) for value in values)
    return [float(value) for value in values] if is_usable else []
