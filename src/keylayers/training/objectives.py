# SPDX-License-Identifier: Apache-2.0
"""The trainer of each objective: TRL's own, with the base model as the reference of its loss."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, Trainer
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from keylayers.model.options import Objective
from keylayers.trainers.reference import REFERENCE_ADAPTER
from keylayers.training.options import TrainingOptions

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it is experimental; docs/objectives.md says so
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

LoadReference = Callable[[], PreTrainedModel]
Values = dict[str, Any]
# TRL's trainer and config, and the options that differ from TRL's defaults.
OBJECTIVES: dict[Objective, tuple[type[Trainer], Callable[..., Any], Values]] = {
    # Examples of sft are tokenised, labelled and cut already.
    "sft": (
        SFTTrainer,
        SFTConfig,
        {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}},
    ),
    "dpo": (DPOTrainer, DPOConfig, {}),
    "kto": (KTOTrainer, KTOConfig, {"train_sampling_strategy": "sequential"}),
    "orpo": (ORPOTrainer, ORPOConfig, {"remove_unused_columns": False}),
    "reward": (RewardTrainer, RewardConfig, {}),
}


def build_trainer(
    options: TrainingOptions,
    settings: Values,
    arguments: Values,
    load_reference: LoadReference | None = None,
) -> Trainer:
    """The objective's trainer, from options of every config and arguments of every constructor.

    `load_reference` gives the base model, for a model without an adapter to switch off.
    """
    model = arguments["model"]
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    values = [weight.data for weight in trained]
    trainer_class, config_class, own = OBJECTIVES[options.objective]
    if options.beta is not None:
        own = own | {"beta": options.beta}
    if options.objective in ("dpo", "kto") and load_reference and not isinstance(model, PeftModel):
        arguments = arguments | {"ref_model": load_reference()}
    if options.objective == "kto":
        # TRL 1.16 pairs each prompt with its neighbour's answer and therefore reads the examples in
        # order; a file may hold first the good answers and then the bad ones.
        shuffled = arguments["train_dataset"].shuffle(seed=options.seed)
        arguments = arguments | {"train_dataset": shuffled}
    with _errors_only(logging.getLogger(trainer_class.__module__)):
        trainer = trainer_class(args=config_class(**settings | own), **arguments)
    # TRL 1.16 rounds trained weights on a 4-bit base to bfloat16, in which small steps are lost.
    for weight, value in zip(trained, values, strict=True):
        if weight.dtype != value.dtype:
            weight.data = value.to(weight.device)
    # TRL 1.16 copies the adapter that it is given and takes the copy as the reference. Our
    # reference is the base model, also where a finished adapter is only ranked.
    if isinstance(model, PeftModel) and REFERENCE_ADAPTER in model.peft_config:
        model.delete_adapter(REFERENCE_ADAPTER)
    return trainer


def prepared_examples(trainer: Trainer) -> Mapping[str, Dataset]:
    """The evaluation examples that the trainer was built with, as it prepared them, by name."""
    found: Mapping[str, Dataset] = trainer.eval_dataset
    return found


@contextlib.contextmanager
def _errors_only(logger: logging.Logger) -> Iterator[None]:
    """Silence advice about options that users do not choose, such as KTO's weights of labels."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
