# SPDX-License-Identifier: Apache-2.0
"""What `keylayers eval` measures, on which models, and how a ranking is verified."""

from dataclasses import asdict, dataclass, fields
from typing import Any

from keylayers.data.options import DataOptions, ReadingOptions
from keylayers.errors import ConfigError
from keylayers.files import distinct_ends
from keylayers.model.options import ModelOptions
from keylayers.options import Options, at_least, check_seed, checked

BASE = "base model"  # its name in tables


@dataclass(frozen=True, kw_only=True)
class ComparedOptions:
    """Which models are compared with the base model.

    Attributes:
        adapter: PEFT adapters of the model, folders or names on the hub.
        checkpoint: Full checkpoints, fine-tuned from the model or not, folders or names on the hub.
        reference: The adapter or checkpoint that the others are compared with, in addition to the
            base model. Default: the first.
    """

    adapter: tuple[str, ...] = ()
    checkpoint: tuple[str, ...] = ()
    reference: str | None = None

    def __post_init__(self) -> None:
        for name in self.sources:
            if self.sources.count(name) > 1:
                raise ConfigError(f"every model must be given once, got {name!r} twice")
            if name == BASE:
                raise ConfigError(
                    f"every model must have a unique name in the table, but {BASE!r} is taken; "
                    f"rename its folder"
                )
        if self.reference not in (None, *self.sources):
            raise ConfigError(
                f"`reference` must be one of the adapters and checkpoints, as it is given there "
                f"({', '.join(self.sources) or 'none is'}), got {self.reference!r}"
            )

    @property
    def sources(self) -> tuple[str, ...]:
        """All of them, in the order of the table."""
        return (*self.adapter, *self.checkpoint)

    @property
    def names(self) -> dict[str, str]:
        """Source -> name in tables: as much of the end of its path as tells all models apart."""
        paths = [source.strip("/").split("/") for source in self.sources]
        return dict(zip(self.sources, distinct_ends(paths, BASE) or self.sources, strict=True))


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(Options):
    """Tasks of lm-evaluation-harness.

    Attributes:
        tasks: Names of tasks and groups, e.g. mmlu,hellaswag, of lm-evaluation-harness or of the
            task folder.
        task_folder: Folder with your own task files (YAML): docs/evaluation.md. Python functions
            that a task file names are run.
        num_fewshot: Examples in each prompt. Default: the task's own value, or 0.
        apply_chat_template: Format the tasks' prompts as a chat.
        run_generated_code: Let tasks run the code that the model writes, e.g. HumanEval.
        limit: Use at most this many documents of each task.
    """

    tasks: tuple[str, ...] = ()
    task_folder: str | None = None
    num_fewshot: int | None = checked(None, at_least(0))
    apply_chat_template: bool = False
    run_generated_code: bool = False
    limit: int | None = checked(None, at_least(1))

    def __post_init__(self) -> None:
        names = (name.strip() for given in self.tasks for name in given.split(","))
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(filter(None, names))))
        super().__post_init__()
        if not self.tasks:
            self.check_left_out("without `tasks`")


@dataclass(frozen=True, kw_only=True)
class LossOptions(ReadingOptions):
    """What a fine-tune gained on its own data, and what it forgot about other text.

    Attributes:
        data: The data of the fine-tune, of which the held-out examples are measured. They are the
            examples that `rank` and `train` hold out if the other options of the data are the same.
        forgetting_data: Text that the base model knows: a .txt file, or data in any format that
            `data` takes.
        forgetting_examples: Use at most this many examples of it; a .txt file is cut into pieces
            of `max_length` tokens.
    """

    forgetting_data: str | None = None
    forgetting_examples: int = checked(200, at_least(2))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data is None:
            self.check_left_out(
                "without `data`", "format", "max_examples", "held_out", "split_seed"
            )
        if self.forgetting_data is None:
            self.check_left_out("without `forgetting_data`", "forgetting_examples")
        if self.data is None and self.forgetting_data is None:
            self.check_left_out("without `data`", "data_split", "max_length")

    def data_options(self, data: str) -> DataOptions:
        """How `data` is read and split, as `rank` and `train` do it."""
        # Without mask data, because it does not change which examples are held out.
        own = {option.name: getattr(self, option.name) for option in fields(ReadingOptions)}
        return DataOptions(**own | {"data": data, "mask_data": "train"})


@dataclass(frozen=True, kw_only=True)
class EvalRunOptions(Options):
    """How an evaluation runs.

    Attributes:
        batch_size: Examples or requests in one batch of the model.
        seed: Chooses the examples in prompts, and the bootstrap samples of the intervals.
    """

    batch_size: int = checked(8, at_least(1))
    seed: int = checked(0, check_seed)


@dataclass(frozen=True)
class EvalOptions:
    """All options of one evaluation."""

    model: ModelOptions
    compared: ComparedOptions = ComparedOptions()
    benchmarks: BenchmarkOptions = BenchmarkOptions()
    losses: LossOptions = LossOptions()
    run: EvalRunOptions = EvalRunOptions()

    def __post_init__(self) -> None:
        if self.model.towers != "language":
            raise ConfigError("`towers` must be left out: an evaluation runs the whole model")
        losses = self.losses
        if not (self.benchmarks.tasks or losses.data or losses.forgetting_data):
            raise ConfigError(
                "something must be measured: give `tasks`, `data` or `forgetting_data`"
            )
        is_chat = self.benchmarks.apply_chat_template or losses.data
        is_plain = (losses.forgetting_data or ".txt").lower().endswith(".txt")
        if losses.chat_template is not None and is_plain and not is_chat:
            raise ConfigError(
                "`chat_template` must be left out without `data`, `apply_chat_template`, or "
                "`forgetting_data` that is no plain text (.txt)"
            )

    def flat(self) -> dict[str, Any]:
        """Every option by the name of its flag, for the record."""
        return {name: own for part in vars(self).values() for name, own in asdict(part).items()}


@dataclass(frozen=True, kw_only=True)
class CurveOptions(Options):
    """How a ranking is verified.

    Attributes:
        points: Points on each mask curve, from no module to all modules.
        random_orders: Number of random orders that serve as the control.
        order_seed: Seed of the random orders.
        leave_one_out: Also measure the leave-one-out order. It takes one forward pass per module
            and batch, which is slow on large models.
        margin: How much worse than all modules the recommended budget may be, as a share of the
            reduction of the held-out loss by the fine-tune.
    """

    points: int = checked(15, at_least(2))
    random_orders: int = checked(5, at_least(1))
    order_seed: int = 0
    leave_one_out: bool = False
    margin: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.margin < 1:
            raise ConfigError(f"`margin` must be a share from 0 to below 1, got {self.margin}")
