# SPDX-License-Identifier: Apache-2.0
"""From the name of a data set to tokenised examples for training and for the held-out loss.

TRL takes a data set with `input_ids` and `labels` as it is, so what the loss counts is decided
here. Duplicates go before the split, so that no held-out example is trained; which examples are
held out depends on their content and the seed only, never on their order in the file. The held-out
examples are the same whether or not others are set aside for the mask.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from keylayers.errors import ConfigError, DataError
from keylayers.options import DataOptions
from keylayers.records import json_sha256
from keylayers.training.chat import ChatTemplate, Encoded, encode_all, resolve_template
from keylayers.training.formats import (
    Conversation,
    Format,
)
from keylayers.training.reading import read_conversations

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
    """Tokenised examples (columns `input_ids` and `labels`), and how they came about."""

    train: "datasets.Dataset"
    mask: "datasets.Dataset | None"
    """Set aside to learn the mask on; nothing if it is learned on `train`."""
    held_out: "datasets.Dataset"
    options: DataOptions
    format: Format
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


def prepare(
    options: DataOptions,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    max_positions: int | None = None,
) -> PreparedData:
    """The examples, tokenised and split.

    Args:
        options: what to read, and how.
        tokenizer: of the model that is trained; stays as it is.
        max_positions: the longest sequence that the model takes, in tokens.

    Raises:
        DataError: the data cannot be read, recognised, rendered or split.
        ConfigError: an option cannot be used, or has no effect on this data.
    """
    format, converted = read_conversations(options)
    if format == "text" and options.chat_template is not None:
        raise ConfigError(
            "`chat_template` works on conversations, got plain text; leave the option out."
        )
    template = None if format == "text" else resolve_template(tokenizer, options.chat_template)
    max_length = min(options.max_length, max_positions or options.max_length)
    distinct = {one.digest(): one for one in converted.conversations}
    chosen = list(distinct)[: options.max_examples]
    usable = _encode_usable([distinct[key] for key in chosen], tokenizer, template, max_length)
    held_out, mask = _hold_out(list(usable), options)
    train = [one for key, one in usable.items() if key not in held_out and key not in mask]
    return PreparedData(
        train=_to_dataset(train),
        mask=_to_dataset([one for key, one in usable.items() if key in mask]) if mask else None,
        held_out=_to_dataset([one for key, one in usable.items() if key in held_out]),
        options=options,
        format=format,
        chat_template=template,
        max_length=max_length,
        content_sha256=_hash_all(chosen),
        counts=DataCounts(
            num_dropped_empty=converted.num_dropped_empty,
            num_duplicates=len(converted.conversations) - len(distinct),
            num_examples=len(chosen),
            num_truncated_away=len(chosen) - len(usable),
            num_mask=len(mask),
            num_held_out=len(held_out),
            **_count(list(usable.values()), train),
        ),
    )


def _count(usable: Sequence[Encoded], train: Sequence[Encoded]) -> dict[str, int]:
    """The part of the counts that follows from the tokens."""
    return {
        "num_train": len(train),
        "num_truncated": sum(one.is_truncated for one in usable),
        "num_last_answer_only": sum(one.is_last_answer_only for one in usable),
        "num_train_tokens": sum(len(one.input_ids) for one in train),
        "num_label_tokens": sum(one.num_label_tokens for one in train),
    }


def _encode_usable(
    chosen: Sequence[Conversation],
    tokenizer: "transformers.PreTrainedTokenizerBase",
    template: ChatTemplate | None,
    max_length: int,
) -> dict[bytes, Encoded]:
    """The examples that have anything to learn after truncation, by digest."""
    encoded = list(encode_all(chosen, tokenizer, template, max_length))
    usable = {
        conversation.digest(): one
        for conversation, one in zip(chosen, encoded, strict=True)
        if one.num_label_tokens > 0
    }
    if not usable:
        longest = max(one.num_prompt_tokens for one in encoded)
        raise DataError(
            f"Prompts must leave room for an answer in {max_length} tokens, got only prompts that "
            f"leave none, the longest of {longest} tokens; raise `--max-length`, or use a model "
            "with more positions."
        )
    return usable


def _hold_out(keys: Sequence[bytes], options: DataOptions) -> tuple[set[bytes], set[bytes]]:
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


def _hash_all(keys: Sequence[bytes]) -> str:
    whole = hashlib.sha256()
    for key in keys:
        whole.update(key)
    return whole.hexdigest()


def _to_dataset(examples: Sequence[Encoded]) -> "datasets.Dataset":
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "input_ids": [one.input_ids for one in examples],
            "labels": [one.labels for one in examples],
        }
    )
