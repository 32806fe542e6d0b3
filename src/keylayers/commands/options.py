# SPDX-License-Identifier: Apache-2.0
"""Options of the commands that open a model: each field is a flag, a YAML key and a record's key.

The options of a command are made of parts, which commands share and `--help` shows as groups. Needs
no torch.
"""

from collections.abc import Collection
from dataclasses import Field, asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias, get_type_hints

from cyclopts import Group, Parameter

from keylayers.commands.scoring_flags import ScoringFlags
from keylayers.data.options import DataOptions
from keylayers.errors import ConfigError
from keylayers.evaluation.options import CurveOptions, EvalOptions
from keylayers.model.options import ModelOptions, UpdateOptions
from keylayers.options import Options, at_least, check_above_zero, checked
from keylayers.ranking.budget import Auto, Budget, Freeze, parse_budget
from keylayers.scores.methods import find_method
from keylayers.training.options import (
    FreezeAction,
    ObjectiveOptions,
    StabilityOptions,
    TrainingOptions,
    check_kto_batch,
)

if TYPE_CHECKING:
    from keylayers.ranking.ranking import Ranking

Control = Literal["all", "random", "first", "last", "worst", "uniform"]
FLAT = Parameter(name="*")  # shows the fields of an options class as flags of their own


def flat(title: str) -> Parameter:
    """Show the fields of an options class as flags of their own, together under `title`."""
    return Parameter(name="*", group=Group.create_ordered(title))


def flat_values(options: Any, without: Collection[str] = ()) -> dict[str, Any]:
    """The values of a command's options by the names of their flags; `without` names parts."""
    found: dict[str, Any] = {}
    for name, part in vars(options).items():
        if name not in without:
            found |= part.scoring().flat() if isinstance(part, ScoringFlags) else asdict(part)
    return found


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(Options):
    """Which modules of a ranking are selected.

    Attributes:
        ranking: Ranking file, or the folder that holds ranking.json.
        budget: How much to select. 0.3: the best 30 % of the modules. 17: the best 17.
            0.3x-params: the best modules with at most 30 % of the parameters. 0.6x-time: modules
            chosen by score per cost, so that a training step costs at most 60 % of a full one.
            auto: what `keylayers verify` recommended. 12GiB, for `train` alone: as many of the
            best modules as a training step can hold in this much memory.
        freeze: Instead of a budget: select all but this share of the modules, for example 0.25.
    """

    ranking: str | None = None
    budget: str | None = None
    freeze: float | None = None

    one_of: ClassVar = {"budget": "such as 0.3", "freeze": "such as 0.25"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._asked()  # refuses what is no budget

    def check(self) -> None:
        """Raise a ConfigError unless the options select one set of modules."""
        self.check_one_given(**self.one_of)

    def budget_for(self, ranking: "Ranking") -> Budget:
        """The budget that is asked for; `auto` is what the ranking's verification recommends."""
        self.check()
        budget = self._asked()
        if not isinstance(budget, Auto):
            assert budget is not None
            return budget
        from keylayers.ranking.verification import auto_budget, verification_file

        assert self.ranking is not None
        return auto_budget(ranking, verification_file(self.ranking))

    def _asked(self) -> Budget | None:
        if self.freeze is not None:
            return Freeze(self.freeze)
        return None if self.budget is None else parse_budget(self.budget)


@dataclass(frozen=True, kw_only=True)
class CutOptions(BudgetOptions):
    """What is kept of an update.

    Attributes:
        max_loss: Instead of a budget: keep the fewest modules, or rank-one parts, whose held-out
            loss is with 95 % confidence at most this much above that of the whole update, in nats.
        pad_ranks: With a ranking of rank-one parts, keep enough further parts that the LoRA rank of
            every module is a multiple of this, for engines that need it.
        heal_steps: Train the cut adapter afterwards for this many steps on the training examples,
            with the defaults of `train`.
        heal_learning_rate: Peak learning rate of these steps. Default: that of `train`. If only a
            few per cent of the parameters are left, a rate several times higher may be better.
    """

    ranking: str = field()  # required; without `field()` it would inherit the default
    max_loss: float | None = checked(None, check_above_zero)
    pad_ranks: int = checked(1, at_least(1))
    heal_steps: int = checked(0, at_least(0))
    heal_learning_rate: float | None = checked(None, check_above_zero)

    one_of: ClassVar = BudgetOptions.one_of | {"max_loss": "such as 0.01 nats"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check()
        if not self.heal_steps:
            self.check_left_out("without `heal_steps`", "heal_learning_rate")


@dataclass(frozen=True, kw_only=True)
class SelectionOptions(BudgetOptions):
    """Which modules are trained, and what they are compared with.

    Attributes:
        rank_first: Instead of a ranking: train all modules until the loss is stable, rank them,
            stop training the lowest-ranked, and continue the same run. --freeze says how many stop;
            the default is 0.25.
        action: What happens to the lowest-ranked modules with --rank-first. freeze keeps what they
            have learned, remove sets it to zero.
        steps: Optimiser steps.
        controls: Also train these sets in the same way and show their held-out loss. all: all
            modules. random, first, last (in the network) or worst (in the ranking): as many modules
            as are selected, or rank-one parts. uniform, for a ranking of parts: the same rank in
            all modules with no more parameters.
    """

    rank_first: bool = False
    action: FreezeAction = "freeze"
    steps: int = checked(300, at_least(1))
    controls: tuple[Control, ...] = ()

    def check(self) -> None:
        """Raise a ConfigError unless the options select one set of modules."""
        self.check_one_given(ranking="a file", rank_first="rank inside the run")
        if self.rank_first:
            self._check_rank_first()
            return
        super().check()
        if self.action != "freeze":
            raise ConfigError(
                f"`action` must be left out without `rank_first`, got {self.action}: modules that "
                f"a ranking leaves out are never trained"
            )

    def _check_rank_first(self) -> None:
        if self.budget is not None:
            raise ConfigError(
                f"`budget` must be left out with `rank_first`, got {self.budget}; give the share "
                f"that is no longer trained as `freeze`, such as 0.25"
            )
        if self.steps < 2:
            raise ConfigError(
                f"`steps` must be at least 2 with `rank_first`, one before the ranking and one "
                f"after it, got {self.steps}"
            )
        for control in {"worst", "uniform"}.intersection(self.controls):
            raise ConfigError(
                f"`controls` with `rank_first` must be of all, random, first and last, got "
                f"{control}; train it on the ranking that this run writes"
            )


@dataclass(frozen=True, kw_only=True)
class MeasuringOptions(CurveOptions):
    """How a ranking is verified.

    Attributes:
        eval_batch_size: Largest number of held-out examples per batch.
    """

    eval_batch_size: int = checked(8, at_least(1))


# Titles of the groups in `--help`, in the order in which they are shown.
Selection = Annotated[SelectionOptions, flat("Selection")]
PruneSelection = Annotated[CutOptions, flat("Selection")]
Model = Annotated[ModelOptions, flat("Model")]
Data = Annotated[DataOptions, flat("Data")]
Update = Annotated[UpdateOptions, flat("An update that exists already")]
Objective = Annotated[ObjectiveOptions, flat("Objective")]
Training = Annotated[TrainingOptions, flat("Fine-tuning")]
Stability = Annotated[StabilityOptions, flat("When stage 1 ends")]
Scoring = Annotated[ScoringFlags, flat("Scoring")]
Curve = Annotated[MeasuringOptions, flat("Measuring")]


def of_stage_1_alone(*, is_extracted: bool) -> tuple[str, ...]:
    """Options of training that have no effect on a ranking of an update that is there already.

    An adapter that is extracted from two checkpoints has a rank, too.
    """
    names = ("update", "learning_rate", "warmup_steps", "gradient_accumulation", "save_steps")
    return (*names, "lora_alpha", *(() if is_extracted else ("lora_rank",)))


@dataclass(frozen=True, kw_only=True)
class RankOptions:
    """All options of a ranking run."""

    model: Model
    data: Data
    update: Update = UpdateOptions()
    training: Training = TrainingOptions()
    stability: Stability = StabilityOptions()
    scoring: Scoring = ScoringFlags()

    def __post_init__(self) -> None:
        scoring = self.scoring.scoring()
        is_dense = self.training.is_full if self.has_stage_1 else self.update.tuned is not None
        if self.has_stage_1 and is_dense and scoring.granularity == "part":
            raise ConfigError(
                "`granularity` part needs a LoRA update, got `update` full; fine-tune as a whole "
                "first, and rank with `tuned`, which makes an adapter of the difference"
            )
        if is_dense and not self.is_extracted and find_method(scoring.method).needs == "examples":
            raise ConfigError(
                f"`method` {scoring.method} needs the gradient of single examples, which the "
                f"difference of two checkpoints does not have; choose elimination"
            )
        if self.has_stage_1:
            self.training.check_weights(self.model)
            return
        where = f"with `{'adapter' if self.update.adapter else 'tuned'}`"
        unused = of_stage_1_alone(is_extracted=self.is_extracted)
        self.training.check_left_out(where, *unused, why=": nothing is fine-tuned")
        self.stability.check_left_out(where, why=": nothing is fine-tuned")
        if self.update.tuned is not None and self.model.load_in_4bit:
            raise ConfigError(
                "`load_in_4bit` must be left out with `tuned`: the difference of two checkpoints "
                "needs the base's own weights"
            )

    @property
    def has_stage_1(self) -> bool:
        """Whether the update is still to be made."""
        return self.update == UpdateOptions()

    @property
    def is_extracted(self) -> bool:
        """Whether rank-one parts are ranked of a difference of checkpoints, made an adapter."""
        return self.update.tuned is not None and self.scoring.scoring().granularity == "part"


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """All options of a training run; `stability` and `scoring` are for `rank_first`."""

    selection: Selection = SelectionOptions()
    model: Model
    data: Data
    training: Training = TrainingOptions()
    stability: Stability = StabilityOptions()
    scoring: Scoring = ScoringFlags()

    def __post_init__(self) -> None:
        self.selection.check()
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
        for part in (self.stability, self.scoring):
            part.check_left_out("without `rank_first`", why=": the modules are ranked already")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """All options of a verification."""

    model: Model
    data: Data
    update: Update = UpdateOptions()
    curve: Curve = MeasuringOptions()
    objective: Objective = ObjectiveOptions()

    def __post_init__(self) -> None:
        check_kto_batch("eval_batch_size", self.curve.eval_batch_size, self.objective)


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """All options of a pruning."""

    selection: PruneSelection
    model: Model
    data: Data
    update: Update = UpdateOptions()
    objective: Objective = ObjectiveOptions()


OpensModel: TypeAlias = RankOptions | TrainOptions | VerifyOptions | PruneOptions
OPTIONS = {
    "rank": RankOptions,
    "train": TrainOptions,
    "verify": VerifyOptions,
    "prune": PruneOptions,
    "eval": EvalOptions,
}


def option_fields(command: str, without: Collection[str] = ()) -> dict[str, Field[Any]]:
    """The fields of a command's options by the names of their flags; `without` names parts."""
    parts = (part for name, part in get_type_hints(OPTIONS[command]).items() if name not in without)
    return {option.name: option for part in parts for option in fields(part)}
