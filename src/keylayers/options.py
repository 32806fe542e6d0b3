# SPDX-License-Identifier: Apache-2.0
"""Every option of a run, once: the fields are the flags, their help and the YAML keys.

Field names are unique across the classes, because a sub-command shows those it needs side by side.
Longer than other files, because every option stands here and nowhere else.
Needs no torch. Defaults are keylayers' own unless a comment gives the paper's.
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from keylayers.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DataFormat = Literal[
    "alpaca", "sharegpt", "messages", "prompt-completion", "lima", "self-instruct", "text"
]
Objective = Literal["sft", "dpo", "kto", "orpo", "reward"]
# What a loss of each objective counts, and what it is a mean over.
LOSS_UNITS: dict[Objective, str] = {
    "sft": "nats per token",
    "dpo": "nats per pair",
    "kto": "KTO's loss, 0 to 1, per answer",
    "orpo": "nats per token and pair",
    "reward": "nats per pair",
}
MAX_PRICE, MAX_SCORE = 1e6, 20
MAX_SEED = 2**32 - 1  # what NumPy's generators take
Granularity = Literal["module", "block", "projection"]
MaskOptimizer = Literal["sgd", "adam"]
MaskData = Literal["train", "held-out"]
Towers = Literal["language", "all"]
Method = Literal[
    "elimination",
    "path",
    "price",
    "ila",
    "leave-one-out",
    "shapley",
    "update-norm",
    "gradient-norm",
    "fisher",
    "aletheia",
    "adalora",
    "lora-drop",
    "eva",
    "plop",
    "spectrum",
    "kappatune",
    "block-influence",
    "cka",
    "first",
    "last",
    "middle",
    "random",
]
_LEARNED = ("granularity", "mask_steps", "mask_optimizer", "mask_learning_rate", "until_stable")
# The options that have an effect, beside `mask_seed`; the others must be left out.
METHOD_OPTIONS: dict[Method, tuple[str, ...]] = {
    "elimination": ("granularity", "mask_batches", "keep_fraction", "until_stable"),
    "path": ("granularity", "mask_batches", "path_points", "until_stable"),
    "price": (*_LEARNED, "price"),
    "ila": (*_LEARNED, "initial_score"),
    "leave-one-out": ("granularity", "mask_batches"),
    "shapley": ("granularity", "mask_batches", "permutations"),
    "update-norm": (),
    "gradient-norm": ("mask_batches",),
    "fisher": ("mask_batches",),
    "aletheia": ("mask_batches",),
    "adalora": ("mask_steps",),
    "lora-drop": ("mask_batches",),
    "eva": ("mask_batches",),
    "plop": ("mask_batches",),
    "spectrum": (),
    "kappatune": (),
    "block-influence": ("mask_batches",),
    "cka": ("mask_batches",),
    "first": (),
    "last": (),
    "middle": (),
    "random": (),
}
UpdateKind = Literal["lora", "rslora", "dora", "adalora", "full"]
Control = Literal["all", "random", "first", "last", "worst"]
FreezeAction = Literal["freeze", "remove"]


def _at_least(name: str, value: int, lowest: int) -> None:
    if value < lowest:
        raise ConfigError(f"`{name}` must be at least {lowest}, got {value}")


def _above_zero(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"`{name}` must be above 0 and finite, got {value}")


def _is_seed(name: str, value: int) -> None:
    if not 0 <= value <= MAX_SEED:
        raise ConfigError(f"`{name}` must be from 0 to {MAX_SEED}, got {value}")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is loaded.

    Attributes:
        model: Folder of the base model, or its name on the hub.
        revision: Branch, tag or commit of the base model on the hub.
        dtype: Of the weights; auto is float32 on a CPU and bfloat16 on an accelerator.
        towers: Blocks that count as the model's: those of the language model, or all, such as those
            of its image tower too.
        load_in_4bit: Load the base weights in 4 bits (NF4, double quantisation), as QLoRA does; the
            adapter stays in `dtype`. Needs bitsandbytes.
        trust_remote_code: Run Python code that comes with the model. Off: nothing of it is
            executed.
    """

    model: str
    revision: str | None = None
    dtype: Dtype = "auto"
    towers: Towers = "language"
    load_in_4bit: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which data, how it is read and split.

    Attributes:
        data: A json, jsonl, csv or parquet file, a folder of such, or a data set's name on the hub
            (owner/name or owner/name:config).
        data_split: Split of a hub data set.
        format: How the columns are read; recognised by their names if not given.
        chat_template: chatml, alpaca, or a Jinja file. The model's own if it has one, else alpaca.
        max_length: Longest example in tokens; what is longer loses its end. At most the model's
            own limit.
        max_examples: Use only the first so many examples.
        held_out: Share of the examples (below 1) or their number that training and mask learning
            never see.
        mask_data: Where the modules are scored: on as many examples as are held out, set aside so
            that neither training nor the held-out loss sees them (held-out), or on the training
            examples (train).
        split_seed: Chooses the held-out examples, whatever the other seeds.
    """

    data: str
    data_split: str = "train"
    format: DataFormat | None = None
    chat_template: str | None = None
    max_length: int = 1024
    max_examples: int | None = None
    held_out: float = 0.1
    mask_data: MaskData = "held-out"  # ranks better: experiments/LOG.md
    split_seed: int = 0

    def __post_init__(self) -> None:
        _at_least("max_length", self.max_length, 2)
        if self.max_examples is not None:
            _at_least("max_examples", self.max_examples, 2)
        if not self.held_out > 0:
            raise ConfigError(
                f"`held_out` must be a share above 0 or a number of examples, got {self.held_out}"
            )


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """What is trained for, and so what a loss is.

    Attributes:
        objective: sft learns answers; dpo, orpo and reward learn from pairs of a chosen and a
            rejected answer, kto from answers that are labelled good or bad; reward trains a model
            that scores answers. docs/objectives.md has the columns that each needs.
        beta: Strength of the pull to the reference model (dpo, kto), or weight of the odds ratio
            (orpo). Not given: TRL's default.
    """

    objective: Objective = "sft"
    beta: float | None = None

    def __post_init__(self) -> None:
        if self.beta is None:
            return
        if self.objective in ("sft", "reward"):
            raise ConfigError(
                f"`beta` must be left out with `objective` {self.objective}: it has no effect there"
            )
        _above_zero("beta", self.beta)


def _check_kto_batch(name: str, batch_size: int, objective: ObjectiveOptions) -> None:
    if objective.objective == "kto" and batch_size < 2:
        raise ConfigError(
            f"`{name}` must be at least 2 with `objective` kto, which compares an answer with its "
            f"neighbours in the batch, got {batch_size}"
        )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(ObjectiveOptions):
    """How a model is fine-tuned.

    Attributes:
        update: What is trained: an adapter (lora, rslora, dora, adalora), or the modules' weights
            themselves (full).
        learning_rate: Peak learning rate. Not given: 2e-4 times the square root of 4096 / hidden
            size for LoRA, a tenth of that for a full fine-tune, and again for dpo and kto.
        batch_size: Examples a device takes at once.
        gradient_accumulation: Batches added up for one step.
        warmup_steps: Steps over which the learning rate rises; constant afterwards.
        lora_rank: Rank r of the LoRA matrices; for adalora the mean that its budget ends at.
        lora_alpha: LoRA's alpha; the update is scaled by alpha / r.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        seed: Of LoRA's initial values, of the order of the batches, and of the mask's batches.
    """

    update: UpdateKind = "lora"
    learning_rate: float | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    warmup_steps: int = 10
    lora_rank: int = 16
    lora_alpha: int = 32
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("batch_size", self.batch_size, 1)
        _check_kto_batch("batch_size", self.batch_size, self)
        _at_least("gradient_accumulation", self.gradient_accumulation, 1)
        _at_least("warmup_steps", self.warmup_steps, 0)
        _at_least("lora_rank", self.lora_rank, 1)
        _at_least("lora_alpha", self.lora_alpha, 1)
        _is_seed("seed", self.seed)
        if self.learning_rate is not None:
            _above_zero("learning_rate", self.learning_rate)
        if self.is_full and self.objective == "reward":
            raise ConfigError(
                "`update` must be an adapter with `objective` reward, whose new head is trained "
                "beside the modules and saved with the adapter, got full"
            )

    @property
    def is_full(self) -> bool:
        """Whether the weights themselves are trained."""
        return self.update == "full"

    def check_weights(self, model: ModelOptions) -> None:
        """Raise a ConfigError if the model is loaded in a way in which it cannot be trained."""
        if self.is_full and model.load_in_4bit:
            raise ConfigError(
                "`load_in_4bit` must be left out with `update` full: packed weights cannot be "
                "trained; choose lora"
            )
        if self.is_full and model.dtype not in ("auto", "float32"):
            raise ConfigError(
                f"`dtype` must be left out with `update` full, which trains float32 weights and "
                f"saves in the base model's own dtype, got {model.dtype}"
            )

    def resolved_learning_rate(self, hidden_size: int, *, is_full: bool = False) -> float:
        """The learning rate that is used; 2e-4 suits LoRA at width 4096."""
        if self.learning_rate is not None:
            return self.learning_rate
        smaller = 0.1 if self.objective in ("dpo", "kto") else 1.0  # as they are used everywhere
        return 2e-4 * math.sqrt(4096 / hidden_size) * (0.1 if is_full else 1.0) * smaller


@dataclass(frozen=True, kw_only=True)
class StabilityOptions:
    """When stage 1 ends: the loss is stable, or the cap is reached.

    The paper learns masks after 25-50 % of training and finds them close to the final one, and
    finds one from 1 % far from it (from memory of its text).

    Attributes:
        max_steps: Hard cap on the steps of stage 1. Not given: 300; inside one run (--rank-first),
            half of the run's steps.
        window: Steps averaged on either side when the loss is compared with itself.
        epsilon: Stage 1 is stable when the mean loss of the last window differs by less than this
            many nats from that of the window before. 0 trains to the cap.
    """

    max_steps: int | None = None
    window: int = 30
    epsilon: float = 0.02

    def __post_init__(self) -> None:
        if self.max_steps is not None:
            _at_least("max_steps", self.max_steps, 1)
        _at_least("window", self.window, 1)
        if not self.epsilon >= 0:
            raise ConfigError(f"`epsilon` must be 0 or more nats, got {self.epsilon}")

    @property
    def stage_1_cap(self) -> int:
        """The cap of a stage 1 of its own."""
        return 300 if self.max_steps is None else self.max_steps

    def cap_within(self, num_steps: int) -> int:
        """The last step after which a mask is learned inside a run of `num_steps`.

        Raises:
            ConfigError: no step would be left after it.
        """
        if self.max_steps is None:
            return max(1, num_steps // 2)  # the paper learns it after 25-50 % (from memory)
        if self.max_steps >= num_steps:
            raise ConfigError(
                f"`max_steps`, after which the mask is learned at the latest, must be below the "
                f"run's {num_steps} steps, got {self.max_steps}; leave it out for half of them"
            )
        return self.max_steps


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """How the modules are scored, with everything else frozen.

    Attributes:
        method: elimination pays each update its share of the loss reduction in nats, in rounds that
            keep ever fewer modules; ila learns a gate for each module as published; path is one
            round of elimination; price learns gates that cost something. The others are known
            rankings to compare with: docs/methods.md.
        granularity: One gate for each module, for each block, or for each projection (elimination,
            path, price, ila, leave-one-out, shapley).
        mask_batches: Batches that a method looks at; elimination takes so many in each round.
        path_points: Points of the integral from no update to all (path).
        keep_fraction: Share of the modules that a round of elimination keeps for the next.
        permutations: Random orders that Shapley values are averaged over (shapley).
        mask_steps: Gradient steps on the scores, one batch each (ila, price); training steps
            (adalora).
        mask_optimizer: Plain gradient descent (sgd) or adam (ila, price). The paper's is not known
            to us.
        mask_learning_rate: Of the scores (ila, price). Not given: 10 for sgd, 0.05 for adam.
        initial_score: Every score at first; the gate is its sigmoid, so 1 is a gate of 0.73 (ila).
        price: Of the mean gate, in nats (price).
        until_stable: Let the selection decide when to stop: when the best share so large, such as
            0.3, has not changed for 10 steps (ila, price; `mask_steps` is the cap), or over two
            more runs on other batches, all averaged (elimination, path; ten runs are the cap).
        mask_seed: Of the order of the mask's batches. Not given: the training's seed.
    """

    method: Method = "elimination"
    granularity: Granularity = "module"
    mask_batches: int = 4
    path_points: int = 4
    keep_fraction: float = 0.7
    permutations: int = 8
    mask_steps: int = 60
    mask_optimizer: MaskOptimizer = "sgd"
    mask_learning_rate: float | None = None
    initial_score: float = 1.0  # the paper tries 4, 2 and 1 (from memory of its text)
    price: float = 2.0
    until_stable: float | None = None
    mask_seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("mask_batches", "path_points", "permutations", "mask_steps"):
            _at_least(name, getattr(self, name), 1)
        self._refuse_options_without_effect()
        if not 0 < self.keep_fraction < 1:
            raise ConfigError(
                f"`keep_fraction` must be above 0 and below 1, got {self.keep_fraction}"
            )
        if not 0 <= self.price <= MAX_PRICE:
            raise ConfigError(f"`price` must be from 0 to {MAX_PRICE:g} nats, got {self.price}")
        if not abs(self.initial_score) <= MAX_SCORE:
            raise ConfigError(
                f"`initial_score` must be from -{MAX_SCORE} to {MAX_SCORE}, where its gate is open "
                f"or closed to float32's precision, got {self.initial_score}"
            )
        if self.method == "adalora":
            _at_least("mask_steps", self.mask_steps, 2)  # its budget falls between two steps
        if self.mask_seed is not None:
            _is_seed("mask_seed", self.mask_seed)
        if self.until_stable is not None and not 0 < self.until_stable < 1:
            raise ConfigError(
                f"`until_stable` must be a share above 0 and below 1, got {self.until_stable}"
            )
        if self.mask_learning_rate is not None:
            _above_zero("mask_learning_rate", self.mask_learning_rate)

    def _refuse_options_without_effect(self) -> None:
        own = ("method", "mask_seed", *METHOD_OPTIONS[self.method])
        for field in fields(self):
            if field.name not in own and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"`{field.name}` must be left out with `method` {self.method}: it has no "
                    f"effect there"
                )

    @property
    def resolved_learning_rate(self) -> float:
        """The learning rate that is used; experiments/LOG.md has the runs behind the defaults."""
        if self.mask_learning_rate is not None:
            return self.mask_learning_rate
        return {"sgd": 10.0, "adam": 0.05}[self.mask_optimizer]


@dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """Where the update comes from; with neither, stage 1 makes it.

    Attributes:
        adapter: A PEFT LoRA adapter of the model, folder or hub name: stage 1 is skipped.
        tuned: A second full checkpoint, fine-tuned from the model: stage 1 is skipped.
    """

    adapter: str | None = None
    tuned: str | None = None

    def __post_init__(self) -> None:
        if self.adapter is not None and self.tuned is not None:
            raise ConfigError(
                "at most one of `adapter` and `tuned` must be given, got both: there is one update "
                "to rank"
            )


@dataclass(frozen=True)
class RankOptions:
    """All options of one ranking run."""

    model: ModelOptions
    data: DataOptions
    update: UpdateOptions = UpdateOptions()
    training: TrainingOptions = TrainingOptions()
    stability: StabilityOptions = StabilityOptions()
    mask: MaskOptions = MaskOptions()

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
        parts = (self.model, self.data, self.update, self.training, self.stability, self.mask)
        return {name: value for part in parts for name, value in asdict(part).items()}


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
        _at_least("points", self.points, 2)
        _at_least("random_orders", self.random_orders, 1)
        _at_least("eval_batch_size", self.eval_batch_size, 1)
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
        _check_kto_batch("eval_batch_size", self.curve.eval_batch_size, self.objective)

    def flat(self) -> dict[str, Any]:
        """Every option by the name of its flag, for the record."""
        parts = (self.model, self.data, self.update, self.curve, self.objective)
        return {name: value for part in parts for name, value in asdict(part).items()}


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """Which modules of a ranking are taken.

    Attributes:
        ranking: Ranking file, or the folder that holds ranking.json.
        budget: How much is taken: 0.3 is 30 % of the modules, 17 is 17 modules, 0.3x-params is
            modules with 30 % of the parameters, auto is what `keylayers verify` recommended.
        freeze: Instead of a budget: take all but the worst share, such as 0.25.
    """

    ranking: str
    budget: str | None = None
    freeze: float | None = None

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.freeze is None):
            given = "neither" if self.budget is None else "both"
            raise ConfigError(
                f"exactly one of `budget` (such as 0.3) and `freeze` (such as 0.25) must be given, "
                f"got {given}"
            )


@dataclass(frozen=True, kw_only=True)
class SelectionOptions:
    """Which modules are trained, and against what they are compared.

    Attributes:
        ranking: Ranking file, or the folder that holds ranking.json.
        rank_first: Instead of a ranking: train all modules until the loss is stable, rank them,
            stop training the worst, and let the same run go on.
        budget: How much is trained: 0.3 is 30 % of the modules, 17 is 17 modules, 0.3x-params is
            modules with 30 % of the parameters, auto is what `keylayers verify` recommended.
        freeze: Instead of a budget: train all but the worst share, such as 0.25, which is what
            --rank-first takes if nothing is given.
        action: What happens to the worst modules inside the run (--rank-first): freeze keeps what
            they have learned, remove sets it to zero.
        steps: Optimiser steps. From the command line: as many as stage 1 of the ranking took, if
            it had one.
        controls: Also train these sets of modules in the same way and show their held-out loss:
            all; or as many modules as selected, random, first, last (of the network) or worst (of
            the ranking).
    """

    ranking: str | None = None
    rank_first: bool = False
    budget: str | None = None
    freeze: float | None = None
    action: FreezeAction = "freeze"
    steps: int = 300
    controls: tuple[Control, ...] = ()

    def __post_init__(self) -> None:
        _at_least("steps", self.steps, 1)
        if self.freeze is not None and not 0 < self.freeze < 1:
            raise ConfigError(f"`freeze` must be above 0 and below 1, got {self.freeze}")
        if (self.ranking is None) != self.rank_first:
            given = "both" if self.rank_first else "neither"
            raise ConfigError(
                f"exactly one of `ranking` (a file) and `rank_first` (rank inside the run) must be "
                f"given, got {given}"
            )
        if self.rank_first:
            self._check_rank_first()
        elif (self.budget is None) == (self.freeze is None):
            given = "neither" if self.budget is None else "both"
            raise ConfigError(
                f"exactly one of `budget` (such as 0.3) and `freeze` (such as 0.25) must be given, "
                f"got {given}"
            )
        elif self.action != "freeze":
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
        if "worst" in self.controls:
            raise ConfigError(
                "`controls` with `rank_first` must be of all, random, first and last, got worst; "
                "train it on the ranking that this run writes"
            )

    @property
    def resolved_freeze(self) -> float:
        """The share that is no longer trained with `rank_first`; a quarter as in the paper."""
        return 0.25 if self.freeze is None else self.freeze


@dataclass(frozen=True)
class TrainOptions:
    """All options of one training run on a selection.

    Attributes:
        selection: What is trained.
        model: Which model.
        data: Which data.
        training: How it is fine-tuned.
        stability: With `rank_first`: when the loss is stable.
        mask: With `rank_first`: how the modules are scored.
    """

    selection: SelectionOptions
    model: ModelOptions
    data: DataOptions
    training: TrainingOptions = TrainingOptions()
    stability: StabilityOptions = StabilityOptions()
    mask: MaskOptions = MaskOptions()

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
        for part in (self.stability, self.mask):
            for one in fields(part):
                if getattr(part, one.name) != one.default:
                    raise ConfigError(
                        f"`{one.name}` must be left out without `rank_first`: the modules are "
                        f"ranked already"
                    )

    def flat(self) -> dict[str, Any]:
        """Every option by the name of its flag, for the record."""
        parts: list[Any] = [self.selection, self.model, self.data, self.training]
        if self.selection.rank_first:
            parts += [self.stability, self.mask]
        return {name: value for part in parts for name, value in asdict(part).items()}


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
