# SPDX-License-Identifier: Apache-2.0
"""What a run reads: a model, data, and an update that exists already."""

from dataclasses import dataclass

from keylayers.errors import ConfigError
from keylayers.options.choices import DataFormat, Dtype, MaskData, Towers
from keylayers.options.ranges import check_at_least


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
        check_at_least("max_length", self.max_length, 2)
        if self.max_examples is not None:
            check_at_least("max_examples", self.max_examples, 2)
        if not self.held_out > 0:
            raise ConfigError(
                f"`held_out` must be a share above 0 or a number of examples, got {self.held_out}"
            )


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
