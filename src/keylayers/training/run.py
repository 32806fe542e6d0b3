# SPDX-License-Identifier: Apache-2.0
"""The one training path: every fine-tune of keylayers, LoRA or full, is a TRL trainer made here.

TRL changes several defaults of transformers (bf16, gradient checkpointing, learning rate, lengths).
We set all of them, so that two runs of keylayers differ only in what their records say.
"""

import math
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from datasets import Dataset, DatasetDict
from huggingface_hub import constants
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    set_seed,
)

from keylayers.apply.trainable import add_lora
from keylayers.errors import ConfigError, LossError, ModelError
from keylayers.model.options import Objective
from keylayers.model.sharding import place_model
from keylayers.progress import OnStep, quiet
from keylayers.trainers.log import check_loggers, name_loggers
from keylayers.trainers.loss import REFERENCE_ADAPTER
from keylayers.training.checkpoints import NUM_CHECKPOINTS, Checkpoints
from keylayers.training.options import StabilityOptions, TrainingOptions
from keylayers.training.shallow import ShallowBackward
from keylayers.training.stability import StabilityWatch
from keylayers.updates.adalora import is_adalora

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it is experimental; docs/objectives.md says so
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

# Key of the measured losses in the trainer's state, which is part of each checkpoint.
STATE_KEY = "keylayers.StabilityWatch"
# TRL's trainer and config, and the options that differ from TRL's defaults.
OBJECTIVES: dict[Objective, tuple[type[Trainer], Callable[..., Any], dict[str, Any]]] = {
    # Examples of sft are tokenised, labelled and cut already.
    "sft": (
        trl.SFTTrainer,
        trl.SFTConfig,
        {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}},
    ),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, {}),
    # TRL 1.16 pairs each prompt with its neighbour's answer and therefore reads the examples in
    # order.
    "kto": (trl.KTOTrainer, trl.KTOConfig, {"train_sampling_strategy": "sequential"}),
    "orpo": (ORPOTrainer, ORPOConfig, {"remove_unused_columns": False}),
    "reward": (trl.RewardTrainer, trl.RewardConfig, {}),
}


@dataclass(frozen=True)
class TrainingResult:
    """How a fine-tune went: the loss of each step in nats, and the wall time."""

    losses: tuple[float, ...]
    stopped_by: str  # stable or max_steps
    seconds: float
    stability: dict[str, Any] = field(default_factory=dict)  # `StabilityWatch.record`

    @property
    def num_steps(self) -> int:
        """Optimiser steps taken."""
        return len(self.losses)


def make_trainer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    options: TrainingOptions,
    *,
    num_steps: int,
    evaluation: Mapping[str, Dataset] | None = None,
    max_length: int | None = None,
    load_reference: Callable[[], PreTrainedModel] | None = None,
    title: str = "training",
) -> Trainer:
    """A trainer of the trainable parameters of `model`, for the objective that `options` name.

    It writes no files, prints nothing, reports only to the loggers that `options` name and sends no
    telemetry. Its `eval_dataset` has the `evaluation` examples as it prepared them. `max_length`,
    in tokens, is for objectives whose trainers tokenise; `load_reference` gives the base model to
    dpo and kto without an adapter.
    """
    check_loggers(options.report_to)
    if isinstance(model.get_output_embeddings(), BaseTunerLayer):
        raise ModelError(
            "an adapter must not update the output head, since TRL's losses read its base weight, "
            "but this one has lm_head among its targets; train the head with `modules_to_save`"
        )
    trainer_class, config_class, own = OBJECTIVES[options.objective]
    if options.beta is not None:
        own = own | {"beta": options.beta}
    if options.objective == "kto":  # a file may hold first the good answers and then the bad ones
        train = train.shuffle(seed=options.seed)
    arguments = {
        "model": model,
        "processing_class": tokenizer,
        "train_dataset": train,
        "eval_dataset": DatasetDict(evaluation) if evaluation else None,
    }
    if options.objective in ("dpo", "kto") and load_reference and not isinstance(model, PeftModel):
        arguments["ref_model"] = load_reference()
    trained = [(weight, weight.data) for weight in model.parameters() if weight.requires_grad]
    told = quiet("datasets", trainer_class.__module__)  # TRL advises on what users cannot set
    telemetry = constants.HF_HUB_DISABLE_TELEMETRY
    constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL 1.16 reports each trainer to a server
    try:
        # trainers create their output folder
        with tempfile.TemporaryDirectory() as scratch, told:
            settings = _settings(model, options) | {"output_dir": scratch}
            settings |= {"max_steps": num_steps, "max_length": max_length, **own}
            trainer = trainer_class(args=config_class(**settings), **arguments)
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = telemetry
    # TRL 1.16 rounds trained weights on a 4-bit base to bfloat16, in which small steps are lost.
    for weight, value in trained:
        if weight.dtype != value.dtype:
            weight.data = value.to(weight.device)
    # TRL 1.16 copies the adapter that it is given and takes the copy as the reference. Our
    # reference is the base model, also where a finished adapter is only ranked.
    if isinstance(model, PeftModel) and REFERENCE_ADAPTER in model.peft_config:
        model.delete_adapter(REFERENCE_ADAPTER)
    trainer.remove_callback(PrinterCallback)
    name_loggers(trainer, title)
    place_model(trainer)
    return trainer


def _settings(model: PreTrainedModel | PeftModel, options: TrainingOptions) -> dict[str, Any]:
    """TRL's options, with every option set whose default differs from transformers or from ours."""
    hidden_size = int(model.config.get_text_config().hidden_size)
    is_full = not isinstance(model, PeftModel)
    has_accelerator = torch.accelerator.is_available()
    return {
        "save_strategy": "no",
        "report_to": list(options.report_to) or "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # the default shows the last good loss instead of NaN
        "learning_rate": options.resolved_learning_rate(hidden_size, is_full=is_full),
        # a decaying rate would look like a stable loss
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": options.warmup_steps,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation,
        # transformers' new name of gradient_checkpointing
        "activation_checkpointing": options.gradient_checkpointing,
        "bf16": model.dtype == torch.bfloat16,
        "fp16": model.dtype == torch.float16,
        "use_cpu": not has_accelerator,
        "dataloader_pin_memory": has_accelerator,
        "seed": options.seed,
        "data_seed": options.seed,
    }


def new_adapter(
    model: PreTrainedModel,
    names: Sequence[str] | Mapping[str, int],
    options: TrainingOptions,
    *,
    num_steps: int,
) -> PeftModel:
    """`model` with a new adapter on exactly `names`, initialised from the options' seed.

    Names may come with the LoRA rank of each, instead of the options' for all. AdaLoRA spreads its
    budget over the `num_steps` of the training to come.
    """
    set_seed(options.seed)
    rank, kind = options.lora_rank, options.update
    shape: dict[str, Any] = {"r": rank}
    if kind == "adalora":  # from 1.5 times the budget down to it (from memory of the paper)
        shape = {"init_r": rank + (rank + 1) // 2, "target_r": rank}
        shape |= {"tinit": num_steps // 10, "tfinal": num_steps // 2, "total_step": num_steps}
    elif kind in ("rslora", "dora"):
        shape[f"use_{kind}"] = True
    if options.objective == "reward":  # PEFT then trains and saves the head too
        shape["task_type"] = "SEQ_CLS"
    return add_lora(model, names, lora_alpha=options.lora_alpha, **shape)


def fine_tune(
    trainer: Trainer,
    stability: StabilityOptions | None = None,
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
) -> TrainingResult:
    """Train until the trainer's last step, or until the loss is stable if a rule is given.

    Stability is measured on the trainer's `mask` examples, or on training examples without them.
    `on_step` is called after each step with its number, from 1, and its loss in nats.
    """
    mask = (trainer.eval_dataset or {}).get("mask") if stability is not None else None
    stable = None if stability is None else StabilityWatch(trainer, stability, mask)
    watch = _LossWatch(stable, on_step)
    callbacks: list[TrainerCallback] = [watch, ShallowBackward()]
    if is_adalora(trainer.model):
        if trainer.is_fsdp_enabled:
            raise ConfigError(
                "`update` must be another than adalora under FSDP: PEFT lowers AdaLoRA's ranks by "
                "whole matrices, of which each process has a part"
            )
        callbacks.append(_RankAllocation())
        # PEFT 0.21 keeps part of AdaLoRA's state outside the checkpoint: it has to start over.
        checkpoints = None
    if checkpoints is not None:
        callbacks.append(checkpoints)
        trainer.args.output_dir = str(checkpoints.folder)
        trainer.args.save_total_limit = NUM_CHECKPOINTS
    for callback in callbacks:
        trainer.add_callback(callback)
    start = time.perf_counter()
    last = checkpoints and checkpoints.last
    try:
        trainer.train(resume_from_checkpoint=last and str(last))
    finally:
        for callback in callbacks:
            trainer.remove_callback(callback)
    for name, weight in trainer.model.named_parameters():  # of which no loss has shown it yet
        if weight.requires_grad and not bool(torch.isfinite(weight).all()):
            raise LossError(
                f"trained weights must be finite, but {name} is not after the last step; lower "
                f"`learning_rate` (now {trainer.args.learning_rate:.3g}) or use `dtype` float32"
            )
    seconds = time.perf_counter() - start if checkpoints is None else checkpoints.seconds
    stopped_by = "stable" if watch.is_stable else "max_steps"
    measured = {} if stable is None else stable.history.record()
    return TrainingResult(tuple(watch.losses), stopped_by, seconds, measured)


class _LossWatch(TrainerCallback):
    """Collects and reports the loss of each step; stops when it is stable or not finite."""

    def __init__(self, stable: StabilityWatch | None, on_step: OnStep | None) -> None:
        self.stable = stable
        self.on_step = on_step
        self.losses: list[float] = []
        self.is_stable = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        self.losses = [float(logs["loss"]) for logs in state.log_history if "loss" in logs]
        saved = state.stateful_callbacks.get(STATE_KEY)
        if self.stable is not None and saved is not None and state.global_step > 0:
            self.stable.history.restore(saved)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if "loss" not in kw["logs"]:
            return
        loss = float(kw["logs"]["loss"])
        if not math.isfinite(loss):
            raise LossError(
                f"the loss must be finite, but it is {loss} at training step {state.global_step}; "
                f"lower `learning_rate` (now {args.learning_rate:.3g}) or use `dtype` float32"
            )
        self.losses.append(loss)
        if self.on_step is not None:
            self.on_step(len(self.losses), loss)
        if self.stable is None:
            return
        if self.stable.see(state.global_step):
            self.is_stable = True
            control.should_training_stop = True
            control.should_save = False  # a training would resume from there
        state.stateful_callbacks[STATE_KEY] = self.stable.history.state()


class _RankAllocation(TrainerCallback):
    """Lets AdaLoRA move its budget between modules, which PEFT leaves to the training loop."""

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        # between the optimiser's step and `zero_grad`: it needs the gradients
        kw["model"].base_model.update_and_allocate(state.global_step + 1)
