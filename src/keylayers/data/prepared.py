# SPDX-License-Identifier: Apache-2.0
"""What all prepared data have in common: three sets, how they came about, and how they are drawn.

Which examples are held out depends on their content and the seed only, never on their order in the
file. The held-out examples are the same whether or not others are set aside for the mask.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from keylayers.data.chat import ChatTemplate
from keylayers.data.options import DataOptions
from keylayers.errors import ConfigError, DataError
from keylayers.files import json_sha256

if TYPE_CHECKING:
    import datasets
    import transformers


@dataclass(frozen=True)
class DataCounts:
    """What became of the rows; all are numbers of examples unless named otherwise."""

    num_dropped_empty: int
    """Without an answer, or with an empty one."""
    num_duplicates: int
    num_examples: int
    """Left after that and after `max_examples`: training, held out and truncated away together."""
    num_train: int
    num_mask: int
    """Set aside for the mask; 0 if it is learned on the training examples."""
    num_held_out: int
    num_truncated: int
    """Used, but without their end."""
    num_truncated_away: int
    """Not used: the prompt alone filled `max_length`."""
    num_last_answer_only: int
    """Used, with the loss on the last answer only, as the template hides where others are."""
    num_train_tokens: int
    num_label_tokens: int
    """Tokens of the training examples that the loss counts."""


@dataclass(frozen=True)
class PreparedData:
    """Examples to train, to score and to measure on, and how they came about.

    Their columns are those that the objective's trainer takes: `input_ids` and `labels` for
    supervised fine-tuning, messages for the others, whose trainers cut them into tokens.
    """

    train: "datasets.Dataset"
    mask: "datasets.Dataset | None"
    """Set aside to learn the mask on; nothing if it is learned on `train`."""
    held_out: "datasets.Dataset"
    options: DataOptions
    format: str
    chat_template: ChatTemplate | None
    """Nothing for plain text."""
    max_length: int
    """The length that was used, in tokens: the one asked for, or all that the model allows."""
    content_sha256: str
    """Hash of the conversations that were used, in order."""
    counts: DataCounts

    def record(self) -> dict[str, object]:
        """What a JSON record of a run says about its data."""
        template = asdict(self.chat_template) if self.chat_template else None
        options = self.options
        split = [
            self.content_sha256,
            options.mask_data,
            options.held_out,
            options.split_seed,
            self.max_length,
        ]
        return {
            **asdict(options),
            "split_sha256": json_sha256([*split, template]),
            "format": self.format,
            "chat_template": template,
            "max_length": self.max_length,
            "max_length_asked": self.options.max_length,
            "content_sha256": self.content_sha256,
            **asdict(self.counts),
        }

    def evaluation(self) -> dict[str, "datasets.Dataset"]:
        """What is not trained on, by name: `held_out`, and `mask` if there is one."""
        parts = {"held_out": self.held_out, "mask": self.mask}
        return {name: part for name, part in parts.items() if part is not None}

    def give_template(self, tokenizer: "transformers.PreTrainedTokenizerBase") -> None:
        """Let the tokenizer that is saved with the result render chats as training did."""
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template.text

    def summary(self) -> list[str]:
        """A line or two for people: what is trained, and what was left out."""
        counts = self.counts
        template = f", chat template {self.chat_template.name!r}" if self.chat_template else ""
        for_mask = f", {counts.num_mask} for the mask" if counts.num_mask else ""
        lines = [
            f"{counts.num_train} examples to train{for_mask} and {counts.num_held_out} held out "
            f"(format {self.format!r}{template}, up to {self.max_length} tokens, the loss on "
            f"{counts.num_label_tokens} of {counts.num_train_tokens})"
        ]
        left_out = {
            "without an answer": counts.num_dropped_empty,
            "duplicates": counts.num_duplicates,
            "cut at the end": counts.num_truncated,
            "too long for any answer": counts.num_truncated_away,
            "with the loss on the last answer only": counts.num_last_answer_only,
        }
        if seen := [f"{number} {reason}" for reason, number in left_out.items() if number]:
            lines.append(f"of the data: {', '.join(seen)}")
        if self.max_length < self.options.max_length:
            lines.append(
                f"max_length {self.options.max_length} lowered to the {self.max_length} positions "
                "that the model has"
            )
        return lines


def hold_out(keys: Sequence[bytes], options: DataOptions) -> tuple[set[bytes], set[bytes]]:
    """The keys of the held-out examples, and of as many for the mask if it gets its own."""
    asked = options.held_out
    if asked >= 1 and asked != int(asked):
        raise ConfigError(
            "`held_out` must be a share below 1 or a whole number of examples, "
            f"got {asked:g}; 0.1 keeps a tenth."
        )
    count = int(asked) if asked >= 1 else max(1, round(asked * len(keys)))
    num_for_mask = count if options.mask_data == "held-out" else 0
    if count + num_for_mask >= len(keys):
        also = f" and {num_for_mask} set aside for the mask" if num_for_mask else ""
        raise DataError(
            f"At least one example must be left to train after {count} held out{also}, got "
            f"{len(keys)} usable examples; lower `--held-out` or give more data."
        )
    # A hash in place of a generator: the choice survives a new Python version and a reordered file.
    salt = f"hold out {options.split_seed}".encode()
    drawn = sorted(keys, key=lambda key: hashlib.sha256(salt + key).digest())
    return set(drawn[:count]), set(drawn[count : count + num_for_mask])


def hash_all(keys: Sequence[bytes]) -> str:
    """The SHA-256 of all examples that were used, in order, in hexadecimal."""
    whole = hashlib.sha256()
    for key in keys:
        whole.update(key)
    return whole.hexdigest()
