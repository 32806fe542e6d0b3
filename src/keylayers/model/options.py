# SPDX-License-Identifier: Apache-2.0
"""Options of a model and of an update that exists already. Needs no torch."""

from dataclasses import dataclass
from typing import Literal

from keylayers.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Towers = Literal["language", "all"]
Objective = Literal["sft", "dpo", "kto", "orpo", "reward"]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model, and how it is loaded.

    Attributes:
        model: Folder of the base model, or its name on the hub.
        revision: Branch, tag or commit of the base model on the hub.
        dtype: Weight dtype. auto: float32 on CPU, bfloat16 on an accelerator.
        towers: Which stacks of blocks are used. language: those of the language model. all: also
            those of an image tower, for example.
        load_in_4bit: Load the base weights in 4 bits (NF4, double quantisation), as QLoRA does. The
            adapter stays in `dtype`. Needs bitsandbytes.
        trust_remote_code: Run Python code that comes with the model. By default none is run.
    """

    model: str
    revision: str | None = None
    dtype: Dtype = "auto"
    towers: Towers = "language"
    load_in_4bit: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class UpdateOptions:
    """An update that exists already; without one, stage 1 makes it.

    Attributes:
        adapter: A PEFT LoRA adapter of the model, as a folder or hub name. Skips stage 1.
        tuned: A full checkpoint that was fine-tuned from the model. Skips stage 1.
    """

    adapter: str | None = None
    tuned: str | None = None

    def __post_init__(self) -> None:
        if self.adapter is not None and self.tuned is not None:
            raise ConfigError(
                "at most one of `adapter` and `tuned` must be given, got both: there is one update "
                "to rank"
            )
