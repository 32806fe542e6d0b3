# SPDX-License-Identifier: Apache-2.0
"""The trainer of each objective: TRL's own."""

import warnings
from collections.abc import Callable
from typing import Any

from transformers import Trainer
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

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it is experimental; docs/objectives.md says so
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

# TRL's trainer and config, and the options that differ from TRL's defaults.
OBJECTIVES: dict[Objective, tuple[type[Trainer], Callable[..., Any], dict[str, Any]]] = {
    # Examples of sft are tokenised, labelled and cut already.
    "sft": (
        SFTTrainer,
        SFTConfig,
        {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}},
    ),
    "dpo": (DPOTrainer, DPOConfig, {}),
    # TRL 1.16 pairs each prompt with its neighbour's answer and therefore reads the examples in
    # order.
    "kto": (KTOTrainer, KTOConfig, {"train_sampling_strategy": "sequential"}),
    "orpo": (ORPOTrainer, ORPOConfig, {"remove_unused_columns": False}),
    "reward": (RewardTrainer, RewardConfig, {}),
}
