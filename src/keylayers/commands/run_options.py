# SPDX-License-Identifier: Apache-2.0
"""All options of one command together, and what must hold between them."""

from dataclasses import asdict, dataclass
from typing import Any

from keylayers.commands.selection import BudgetOptions, SelectionOptions
from keylayers.data.options import DataOptions
from keylayers.errors import ConfigError
from keylayers.model.options import ModelOptions, UpdateOptions
from keylayers.ranges import check_at_least
from keylayers.scores.scoring_options import ScoringOptions
from keylayers.training.options import (
    ObjectiveOptions,
    StabilityOptions,
    TrainingOptions,
    check_kto_batch,
)

# Of the options that a ranking records, those that `train`, `verify` and `prune` take over where
# none is given. Not `trust_remote_code`: a file from elsewhere must not be able to switch it on.
TAKEN_FROM_RANKING = (
    "model",
    "revision",
    "towers",
    "load_in_4bit",
    "data",
    "data_split",
    "format",
    "chat_template",
    "max_length",
    "max_examples",
    "held_out",
    "mask_data",
    "split_seed",
    "update",
    "objective",
    "beta",
    "learning_rate",
    "batch_size",
    "gradient_accumulation",
    "warmup_steps",
    "lora_rank",
    "lora_alpha",
    "seed",
)
TAKEN_WITH_UPDATE = ("dtype", "adapter", "tuned")  # `verify` and `prune` open the ranked update


@dataclass(frozen=True)
class RankOptions:
    """All options of one ranking run."""

    model: ModelOptions
    data: DataOptions
    update: UpdateOptions = UpdateOptions()
    training: TrainingOptions = TrainingOptions()
    stability: StabilityOptions = StabilityOptions()
    scoring: ScoringOptions = ScoringOptions()

    def __post_init__(self) -> None:
        if self.update == UpdateOptions():
            self.training.check_weights(self.model)
        elif self.update.tuned is not None and self.model.load_in_4bit:
            raise ConfigError(
                "`load_in_4bit` must be left out with `tuned`: the difference of two checkpoints "
                "needs the base's own weights"
            )

    def flat(self) -> dict[str, Any]:
        """Every option by the name of its flag, for the record."""
        parts = (self.model, self.data, self.update, self.training, self.stability)
        flat = {name: value for part in parts for name, value in asdict(part).items()}
        return flat | self.scoring.flat()


@dataclass(frozen=True, kw_only=True)
class CurveOptions:
    """How a ranking is verified.

    Attributes:
        points: Points on each mask curve, from none to all modules.
        random_orders: How many random orders are measured beside the ranking, as its control.
        order_seed: Of the random orders.
        leave_one_out: Also measure the order by leave-one-out: one forward pass a module and batch,
            so slow on large models.
        margin: How much worse than all modules the recommended budget may be, as a share of what
            the fine-tune lowered the held-out loss by.
        eval_batch_size: Held-out examples that the model takes at once, at most.
    """

    points: int = 15
    random_orders: int = 5
    order_seed: int = 0
    leave_one_out: bool = False
    margin: float = 0.05
    eval_batch_size: int = 8

    def __post_init__(self) -> None:
        check_at_least("points", self.points, 2)
        check_at_least("random_orders", self.random_orders, 1)
        check_at_least("eval_batch_size", self.eval_batch_size, 1)
        if not 0 <= self.margin < 1:
            raise ConfigError(f"`margin` must be a share from 0 to below 1, got {self.margin}")


@dataclass(frozen=True)
class VerifyOptions:
    """All options of one verification."""

    model: ModelOptions
    data: DataOptions
    update: UpdateOptions = UpdateOptions()
    curve: CurveOptions = CurveOptions()
    objective: ObjectiveOptions = ObjectiveOptions()

    def __post_init__(self) -> None:
        check_kto_batch("eval_batch_size", self.curve.eval_batch_size, self.objective)

    def flat(self) -> dict[str, Any]:
        """Every option by the name of its flag, for the record."""
        parts = (self.model, self.data, self.update, self.curve, self.objective)
        return {name: value for part in parts for name, value in asdict(part).items()}


@dataclass(frozen=True)
class TrainOptions:
    """All options of one training run on a selection.

    Attributes:
        selection: What is trained.
        model: Which model.
        data: Which data.
        training: How it is fine-tuned.
        stability: With `rank_first`: when the loss is stable.
        scoring: With `rank_first`: how the modules are scored.
    """

    selection: SelectionOptions
    model: ModelOptions
    data: DataOptions
    training: TrainingOptions = TrainingOptions()
    stability: StabilityOptions = StabilityOptions()
    scoring: ScoringOptions = ScoringOptions()

    def __post_init__(self) -> None:
        self.training.check_weights(self.model)
        if self.selection.rank_first:
            if self.training.is_full:
                raise ConfigError(
                    "`update` must be an adapter with `rank_first`, got full: ranking needs the "
                    "weights that a full fine-tune started from; make a ranking first with "
                    "`keylayers rank`"
                )
            self.stability.cap_within(self.selection.steps)
            return
        given = asdict(self.stability) | self.scoring.flat()
        usual = asdict(StabilityOptions()) | ScoringOptions().flat()
        for name, value in given.items():
            if value != usual.get(name):
                raise ConfigError(
                    f"`{name}` must be left out without `rank_first`: the modules are ranked "
                    f"already"
                )

    def flat(self) -> dict[str, Any]:
        """Every option by the name of its flag, for the record."""
        parts: list[Any] = [self.selection, self.model, self.data, self.training]
        if self.selection.rank_first:
            parts.append(self.stability)
        flat = {name: value for part in parts for name, value in asdict(part).items()}
        return flat | (self.scoring.flat() if self.selection.rank_first else {})


@dataclass(frozen=True)
class PruneOptions:
    """All options of one pruning of an update that exists already."""

    selection: BudgetOptions
    model: ModelOptions
    data: DataOptions
    update: UpdateOptions = UpdateOptions()
    objective: ObjectiveOptions = ObjectiveOptions()

    def flat(self) -> dict[str, Any]:
        """Every option by the name of its flag, for the record."""
        parts = (self.selection, self.model, self.data, self.update, self.objective)
        return {name: value for part in parts for name, value in asdict(part).items()}
