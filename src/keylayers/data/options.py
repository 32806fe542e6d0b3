# SPDX-License-Identifier: Apache-2.0
"""Options of the data: where they are, how they are read and split. Needs no torch."""

from dataclasses import dataclass, field
from typing import Literal

from keylayers.errors import ConfigError
from keylayers.options import Options, at_least, checked

DataFormat = Literal[
    "alpaca", "sharegpt", "messages", "prompt-completion", "lima", "self-instruct", "text"
]
MaskData = Literal["train", "held-out"]


@dataclass(frozen=True, kw_only=True)
class ReadingOptions(Options):
    """How data is read and split.

    Attributes:
        data: A json, jsonl, csv or parquet file, a folder of such files, or the name of a data set
            on the hub (owner/name or owner/name:config).
        data_split: Split of a hub data set.
        format: How the columns are read. Default: recognised by their names.
        chat_template: chatml, alpaca, or a Jinja file. Default: the model's own, or alpaca if it
            has none.
        max_length: Longest example in tokens; longer examples are cut at the end. At most the
            model's own limit.
        max_examples: Use only this many examples, the first ones.
        held_out: Share (below 1) or number of the examples that neither training nor scoring sees.
        split_seed: Seed of the choice of held-out examples; no other seed affects it.
    """

    data: str | None = None
    data_split: str = "train"
    format: DataFormat | None = None
    chat_template: str | None = None
    max_length: int = checked(1024, at_least(2))
    max_examples: int | None = checked(None, at_least(2))
    held_out: float = 0.1
    split_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        is_count = self.held_out >= 1 and self.held_out % 1 == 0
        if not (0 < self.held_out < 1 or is_count):
            raise ConfigError(
                "`held_out` must be a share above 0 and below 1, or a whole number of examples, "
                f"got {self.held_out:g}; 0.1 keeps a tenth."
            )


@dataclass(frozen=True, kw_only=True)
class DataOptions(ReadingOptions):
    """Which data, how it is read and split.

    Attributes:
        mask_data: Which examples the modules are scored on. held-out: examples that are set aside
            for this alone, as many as are held out. train: the training examples.
    """

    data: str = field()  # required; without `field()` it would inherit the default
    mask_data: MaskData = "held-out"  # ranks better: experiments/LOG.md
