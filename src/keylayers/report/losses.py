# SPDX-License-Identifier: Apache-2.0
"""The loss curves that a ranking's record holds. Needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from keylayers.ranking.ranking import Ranking


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
    made_by = ranking.made_by
    stages = {}
    if made_by.stage_1 is not None:
        stages["stage 1, training"] = made_by.stage_1.losses
    if made_by.mask is not None and made_by.mask.learning_rate is not None:
        # otherwise each loss is that of another mask
        stages["stage 2, learning the scores"] = made_by.mask.losses
    stages = {title: losses for title, losses in stages.items() if len(losses) > 1}
    if not stages:
        return None
    losses = made_by.held_out_loss_nats
    held_out = [] if losses is None else [("base", losses.base), ("tuned", losses.tuned)]
    return LossCurves(stages, held_out, made_by.loss_unit)
