# SPDX-License-Identifier: Apache-2.0
"""What can be trained for, and which trainer each objective has.

One table. The trainers are TRL's own, with every option set in which TRL's defaults surprise, and
with the base model as the reference of losses that have one.
"""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, DatasetDict
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
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

from keylayers.errors import GuardError
from keylayers.model.options import Objective
from keylayers.trainers.reference import REFERENCE_ADAPTER
from keylayers.training.options import TrainingOptions

LoadReference = Callable[[], PreTrainedModel]


@dataclass(frozen=True)
class TrainerParts:
    """What a trainer is built of.

    Attributes:
        model: With or without an adapter.
        tokenizer: Renders and tokenises preferences.
        train: Examples to train.
        evaluation: More examples that the trainer prepares in the same way, by name.
        options: How to train.
        settings: Options of every trainer's config.
        max_length: Longest sequence in tokens; examples of supervised fine-tuning are cut already.
        load_reference: Gives the base model, for a model that cannot switch an adapter off.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    evaluation: Mapping[str, Dataset]
    options: TrainingOptions
    settings: Mapping[str, Any]
    max_length: int | None
    load_reference: LoadReference | None

    def arguments(self) -> dict[str, Any]:
        """What every trainer's constructor takes beside its config."""
        return {
            "model": self.model,
            "processing_class": self.tokenizer,
            "train_dataset": self.train,
            "eval_dataset": DatasetDict(self.evaluation) if self.evaluation else None,
        }

    def preference_settings(self) -> dict[str, Any]:
        """Options of the config of a trainer that learns from preferences."""
        beta = {} if self.options.beta is None else {"beta": self.options.beta}
        return {**self.settings, "max_length": self.max_length, **beta}

    def reference(self) -> dict[str, Any]:
        """The base model as the reference, where no adapter can be switched off."""
        if isinstance(self.model, PeftModel) or self.load_reference is None:
            return {}
        return {"ref_model": self.load_reference()}


def build_trainer(parts: TrainerParts) -> Trainer:
    """The objective's trainer, with the same weights trainable as before, bit for bit.

    Raises:
        GuardError: TRL made other weights trainable than were.
    """
    model = parts.model
    trainable = _trainable(model)
    values = [one.data for one in trainable.values()]
    trainer = OBJECTIVES[parts.options.objective](parts)
    # On a 4-bit base TRL rounds what is trained to bfloat16, in which small steps are lost.
    for parameter, value in zip(trainable.values(), values, strict=True):
        if parameter.dtype != value.dtype:
            parameter.data = value.to(parameter.device)
    # TRL takes the adapter that it is given for the reference; what training starts from is the
    # base model, also where the adapter is finished and only to be ranked.
    if isinstance(model, PeftModel) and REFERENCE_ADAPTER in model.peft_config:
        model.delete_adapter(REFERENCE_ADAPTER)
    changed = sorted(_trainable(model).keys() ^ trainable.keys())
    if changed:
        raise GuardError(
            f"a trainer must leave it to keylayers what is trained, but {len(changed)} weights "
            f"changed, first {changed[0]}"
        )
    return trainer


def prepared_examples(trainer: Trainer) -> Mapping[str, Dataset]:
    """What the trainer made of the examples to evaluate on that it was built with, by name."""
    found: Mapping[str, Dataset] = trainer.eval_dataset
    return found


def _trainable(model: PreTrainedModel | PeftModel) -> dict[str, nn.Parameter]:
    return {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def _sft(parts: TrainerParts) -> Trainer:
    config = SFTConfig(
        **parts.settings,
        max_length=None,  # the data is cut to length when it is prepared
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return SFTTrainer(args=config, **parts.arguments())


def _dpo(parts: TrainerParts) -> Trainer:
    config = DPOConfig(**parts.preference_settings(), precompute_ref_log_probs=False)
    return DPOTrainer(args=config, **parts.arguments(), **parts.reference())


def _kto(parts: TrainerParts) -> Trainer:
    config = KTOConfig(
        **parts.preference_settings(),
        precompute_ref_log_probs=False,
        train_sampling_strategy="sequential",  # each prompt is paired with its neighbour's answer
    )
    arguments = parts.arguments()
    # the order of the file may be one label after the other; the trainer would keep it
    arguments["train_dataset"] = parts.train.shuffle(seed=parts.options.seed)
    with _errors_only(logging.getLogger(KTOTrainer.__module__)):  # it recommends weights of labels
        return KTOTrainer(args=config, **arguments, **parts.reference())


@contextlib.contextmanager
def _errors_only(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _orpo(parts: TrainerParts) -> Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental; docs/objectives.md says so
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    config = ORPOConfig(**parts.preference_settings(), remove_unused_columns=False)
    return ORPOTrainer(args=config, **parts.arguments())


def _reward(parts: TrainerParts) -> Trainer:
    return RewardTrainer(args=RewardConfig(**parts.preference_settings()), **parts.arguments())


OBJECTIVES: dict[Objective, Callable[[TrainerParts], Trainer]] = {
    "sft": _sft,
    "dpo": _dpo,
    "kto": _kto,
    "orpo": _orpo,
    "reward": _reward,
}
