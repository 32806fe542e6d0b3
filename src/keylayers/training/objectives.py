# SPDX-License-Identifier: Apache-2.0
"""The trainer of each objective: TRL's own, with the base model as the reference of its loss."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from datasets import Dataset
from peft import PeftModel
from torch import nn
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

from keylayers.errors import GuardError
from keylayers.model.options import Objective
from keylayers.trainers.reference import REFERENCE_ADAPTER
from keylayers.training.options import TrainingOptions

LoadReference = Callable[[], PreTrainedModel]
Values = dict[str, Any]


def build_trainer(
    options: TrainingOptions,
    settings: Values,
    arguments: Values,
    max_length: int | None = None,
    load_reference: LoadReference | None = None,
) -> Trainer:
    """The objective's trainer; it trains exactly the weights that were trainable before.

    Args:
        options: Name the objective.
        settings: Options of every trainer's config.
        arguments: Of every trainer's constructor, with `model` and `train_dataset`.
        max_length: Longest sequence in tokens; examples of supervised fine-tuning are cut already.
        load_reference: Gives the base model, for a model without an adapter to switch off.

    Raises:
        GuardError: TRL changed which weights are trainable.
    """
    model = arguments["model"]
    trainable = _trainable(model)
    values = [parameter.data for parameter in trainable.values()]
    if options.objective != "sft":
        settings = settings | {"max_length": max_length}
    if options.beta is not None:
        settings = settings | {"beta": options.beta}
    if options.objective in ("dpo", "kto") and load_reference and not isinstance(model, PeftModel):
        arguments = arguments | {"ref_model": load_reference()}
    trainer = OBJECTIVES[options.objective](settings, arguments)
    # TRL 1.16 rounds trained weights on a 4-bit base to bfloat16, in which small steps are lost.
    for parameter, value in zip(trainable.values(), values, strict=True):
        if parameter.dtype != value.dtype:
            parameter.data = value.to(parameter.device)
    # TRL 1.16 copies the adapter that it is given and takes the copy as the reference. Our
    # reference is the base model, also where a finished adapter is only ranked.
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
    """The evaluation examples that the trainer was built with, as it prepared them, by name."""
    found: Mapping[str, Dataset] = trainer.eval_dataset
    return found


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _sft(settings: Values, arguments: Values) -> Trainer:
    # The examples are tokenised, labelled and cut already.
    as_they_are = {"max_length": None, "packing": False}
    config = SFTConfig(**settings, **as_they_are, dataset_kwargs={"skip_prepare_dataset": True})
    return SFTTrainer(args=config, **arguments)


def _dpo(settings: Values, arguments: Values) -> Trainer:
    return DPOTrainer(args=DPOConfig(**settings, precompute_ref_log_probs=False), **arguments)


def _kto(settings: Values, arguments: Values) -> Trainer:
    # TRL 1.16 pairs each prompt with its neighbour's answer and therefore reads the examples in
    # order; a file may hold first the good answers and then the bad ones.
    shuffled = arguments["train_dataset"].shuffle(seed=settings["seed"])
    settings = settings | {"train_sampling_strategy": "sequential"}
    config = KTOConfig(**settings, precompute_ref_log_probs=False)
    with _errors_only(logging.getLogger(KTOTrainer.__module__)):  # it recommends label weights
        return KTOTrainer(args=config, **arguments | {"train_dataset": shuffled})


@contextlib.contextmanager
def _errors_only(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _orpo(settings: Values, arguments: Values) -> Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental; docs/objectives.md says so
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer
    return ORPOTrainer(args=ORPOConfig(**settings, remove_unused_columns=False), **arguments)


def _reward(settings: Values, arguments: Values) -> Trainer:
    return RewardTrainer(args=RewardConfig(**settings), **arguments)


OBJECTIVES: dict[Objective, Callable[[Values, Values], Trainer]] = {
    "sft": _sft,
    "dpo": _dpo,
    "kto": _kto,
    "orpo": _orpo,
    "reward": _reward,
}
