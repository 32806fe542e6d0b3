# SPDX-License-Identifier: Apache-2.0
"""Options of the data: where they are, how they are read and split. Needs no torch."""

from dataclasses import dataclass
from typing import Literal

from keylayers.errors import ConfigError
from keylayers.ranges import check_at_least

DataFormat = Literal[
    "alpaca", "sharegpt", "messages", "prompt-completion", "lima", "self-instruct", "text"
]
MaskData = Literal["train", "held-out"]


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
