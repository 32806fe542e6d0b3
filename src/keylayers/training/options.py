# SPDX-License-Identifier: Apache-2.0
"""How a model is fine-tuned, for which objective, and when the loss counts as stable."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from keylayers.errors import ConfigError
from keylayers.model.options import ModelOptions, Objective
from keylayers.options import Options, at_least, check_above_zero, check_seed, checked

UpdateKind = Literal["lora", "rslora", "dora", "adalora", "full"]
FreezeAction = Literal["freeze", "remove"]
# What a loss of each objective counts, and what it is a mean over.
LOSS_UNITS: dict[Objective, str] = {
    "sft": "nats per token",
    "dpo": "nats per pair",
    "kto": "KTO's loss, 0 to 1, per answer",
    "orpo": "nats per token and pair",
    "reward": "nats per pair",
}


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions(Options):
    """The objective, which decides what a loss is.

    Attributes:
        objective: sft learns answers. dpo, orpo and reward learn from pairs of a chosen and a
            rejected answer, kto from answers labelled good or bad. reward trains a model that
            scores answers. docs/objectives.md lists the columns that each needs.
        beta: Strength of the pull to the reference model (dpo, kto), or weight of the odds ratio
            (orpo). Default: TRL's.
    """

    objective: Objective = "sft"
    beta: float | None = checked(None, check_above_zero)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta is not None and self.objective in ("sft", "reward"):
            raise ConfigError(
                f"`beta` must be left out with `objective` {self.objective}: it has no effect there"
            )


def check_kto_batch(name: str, batch_size: int, objective: ObjectiveOptions) -> None:
    """Refuse kto with a single example per batch."""
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
        learning_rate: Peak learning rate. Default: 2e-4 times the square root of 4096 / hidden size
            for LoRA; a tenth of that for a full fine-tune; a tenth again for dpo and kto.
        batch_size: Examples per device and batch.
        gradient_accumulation: Batches per optimiser step.
        warmup_steps: Steps over which the learning rate rises; it is constant afterwards.
        lora_rank: Rank r of the LoRA matrices; for adalora the mean rank at the end.
        lora_alpha: LoRA's alpha; the update is scaled by alpha / r.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, more time.
        seed: Seed of LoRA's initial values, of the order of the batches, and of the batches that
            modules are scored on.
        report_to: Loggers of losses, scores and gates, by their transformers names: tensorboard,
            wandb, mlflow, trackio and others. TensorBoard writes to `runs`, or to
            TENSORBOARD_LOGGING_DIR. Default: none.
        save_steps: Steps between checkpoints; the same command continues a stopped run from the
            last one. 0: no checkpoints. Default: by time, so that saving takes less than 5 % of it.
    """

    update: UpdateKind = "lora"
    learning_rate: float | None = checked(None, check_above_zero)
    batch_size: int = checked(8, at_least(1))
    gradient_accumulation: int = checked(1, at_least(1))
    warmup_steps: int = checked(10, at_least(0))
    lora_rank: int = checked(16, at_least(1))
    lora_alpha: int = checked(32, at_least(1))
    gradient_checkpointing: bool = False
    seed: int = checked(0, check_seed)
    report_to: tuple[str, ...] = ()
    save_steps: int | None = checked(None, at_least(0))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kto_batch("batch_size", self.batch_size, self)
        if self.is_full and self.objective == "reward":
            raise ConfigError(
                "`update` must be an adapter with `objective` reward, whose new head is trained "
                "with the modules and saved with the adapter, got full"
            )

    def decisive(self) -> dict[str, Any]:
        """The options that decide the result of a training: all but loggers and checkpoints."""
        return asdict(replace(self, report_to=(), save_steps=None))

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

    def resolved_learning_rate(self, hidden_size: int, *, is_full: bool) -> float:
        """The learning rate that is used; 2e-4 suits LoRA at width 4096."""
        if self.learning_rate is not None:
            return self.learning_rate
        smaller = 0.1 if self.objective in ("dpo", "kto") else 1.0  # as is usual for them
        return 2e-4 * math.sqrt(4096 / hidden_size) * (0.1 if is_full else 1.0) * smaller


@dataclass(frozen=True, kw_only=True)
class StabilityOptions(Options):
    """When stage 1 ends: the loss is stable, or the cap is reached.

    The paper asks that the expected loss of every later step changes by less than epsilon. The
    future is not known while training runs, so we measure the loss of the same few examples every
    window (`keylayers.training.stability`). As we remember the paper, a mask learned after 25 to
    50 % of the training is close to the final one and a mask after 1 % is not, so a window should
    be a few per cent of a run.

    Attributes:
        max_steps: Largest number of steps of stage 1. Default: 300; inside a training run, half of
            that run's steps.
        window: Steps between two measurements of the loss on the same 32 examples, which start
            after the warm-up.
        epsilon: The loss is stable when it surely (95 %) fell by less than this many nats in the
            last window, or rose. 0: train to the cap.
    """

    max_steps: int | None = checked(None, at_least(1))
    window: int = checked(30, at_least(1))
    epsilon: float = checked(0.02, at_least(0))

    @property
    def stage_1_cap(self) -> int:
        """The cap of a stage 1 that is a run of its own."""
        return 300 if self.max_steps is None else self.max_steps

    def cap_within(self, num_steps: int) -> int:
        """The last step after which a mask is learned inside a run of `num_steps`."""
        if self.max_steps is None:
            return max(1, num_steps // 2)
        if self.max_steps >= num_steps:
            raise ConfigError(
                f"`max_steps`, after which the mask is learned at the latest, must be below the "
                f"run's {num_steps} steps, got {self.max_steps}; leave it out for half of them"
            )
        return self.max_steps
