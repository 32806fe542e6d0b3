# SPDX-License-Identifier: Apache-2.0
"""From the name of a data set to examples for training, for the scores and for the held-out loss.

Supervised fine-tuning gets `input_ids` and `labels`, which TRL takes as they are, so keylayers
decides what the loss counts. Preferences stay messages, which TRL's trainers tokenise. Duplicates
are removed before the split. Only content and seed decide which examples are held out, not the
order in the file, nor whether others are set aside for the mask.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, TypeAlias

from keylayers.data.chat import ChatTemplate, Encoded, encode_all, resolve_template
from keylayers.data.formats import Conversation
from keylayers.data.options import DataOptions
from keylayers.data.preferences import MeasuredPreference, Preference, measure
from keylayers.data.reading import read_conversations, read_preferences
from keylayers.errors import ConfigError, DataError
from keylayers.files import json_sha256
from keylayers.model.options import Objective

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

Example: TypeAlias = Encoded | MeasuredPreference


@dataclass(frozen=True)
class DataCounts:
    """Numbers of examples, by what became of them; tokens are those of the training examples."""

    num_dropped_empty: int  # without an answer, or with an empty one
    num_duplicates: int
    num_examples: int  # left after that and `max_examples`, before too long ones are left out
    num_train: int
    num_mask: int  # set aside for the mask; 0 if it is learned on the training examples
    num_held_out: int
    num_truncated: int  # used without their end
    num_truncated_away: int  # not used: the prompt alone fills `max_length`
    num_last_answer_only: int  # the loss counts the last answer only: the template hides the others
    num_train_tokens: int
    num_label_tokens: int  # that the loss counts


@dataclass(frozen=True)
class PreparedData:
    """Examples to train, to score and to measure on, and where they come from.

    Their columns are those that the objective's trainer takes.

    Attributes:
        train: Training examples.
        mask: Examples to learn the mask on; None if it is learned on `train`.
        held_out: Examples that neither training nor scoring sees.
        options: What was asked for.
        format: How the rows were read.
        chat_template: None for plain text.
        max_length: In tokens: `options.max_length`, or the model's own limit.
        content_sha256: Hash of the examples that were used, in order.
        counts: What became of the rows.
    """

    train: "datasets.Dataset"
    mask: "datasets.Dataset | None"
    held_out: "datasets.Dataset"
    options: DataOptions
    format: str
    chat_template: ChatTemplate | None
    max_length: int
    content_sha256: str
    counts: DataCounts

    def record(self) -> dict[str, object]:
        """The part of a run's JSON record about its data."""
        template = asdict(self.chat_template) if self.chat_template else None
        asked = self.options
        split = [self.content_sha256, asked.mask_data, asked.held_out, asked.split_seed]
        return {
            **asdict(asked),
            "split_sha256": json_sha256([*split, self.max_length, template]),
            "format": self.format,
            "chat_template": template,
            "max_length": self.max_length,
            "max_length_asked": asked.max_length,
            "content_sha256": self.content_sha256,
            **asdict(self.counts),
        }

    def evaluation(self) -> dict[str, "datasets.Dataset"]:
        """The examples that are not trained on: `held_out`, and `mask` if there is one."""
        parts = {"held_out": self.held_out, "mask": self.mask}
        return {name: part for name, part in parts.items() if part is not None}

    def give_template(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        """Let the tokenizer that is saved with the result render chats as training did."""
        if self.chat_template is not None:
            tokenizer.chat_template = self.chat_template.text

    def summary(self) -> list[str]:
        """A few lines for users: how many examples are used, and what was left out."""
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
    tokenizer: "PreTrainedTokenizerBase",
    max_positions: int | None = None,
    objective: Objective = "sft",
) -> PreparedData:
    """The examples, split, and tokenised unless the objective's trainer does that.

    Args:
        options: What to read, and how.
        tokenizer: Of the model that is trained; it is not changed.
        max_positions: The longest sequence that the model takes, in tokens.
        objective: What the examples will train.

    Raises:
        DataError: the data cannot be read, recognised, rendered or split, or does not fit the
            objective.
        ConfigError: an option cannot be used, or has no effect on this data.
    """
    format: str
    found: Sequence[Conversation | Preference]
    if objective == "sft":
        format, found, num_dropped_empty = read_conversations(options)
    else:
        format, found, num_dropped_empty = read_preferences(options, objective)
    if format == "text" and options.chat_template is not None:
        raise ConfigError(
            "`chat_template` works on conversations, got plain text; leave the option out."
        )
    template = None if format == "text" else resolve_template(tokenizer, options.chat_template)
    max_length = min(options.max_length, max_positions or options.max_length)
    by_digest = {example.digest(): example for example in found}
    chosen = dict(list(by_digest.items())[: options.max_examples])
    usable = _usable(chosen, objective, tokenizer, template, max_length)
    held_out, mask = _hold_out(list(usable), options)
    elsewhere = held_out | mask
    train = [usable[key] for key in usable if key not in elsewhere]
    _check_labels(train)
    return PreparedData(
        train=_to_dataset(train),
        mask=_to_dataset(usable[key] for key in usable if key in mask) if mask else None,
        held_out=_to_dataset(usable[key] for key in usable if key in held_out),
        options=options,
        format=format,
        chat_template=template,
        max_length=max_length,
        content_sha256=hashlib.sha256(b"".join(chosen)).hexdigest(),
        counts=DataCounts(
            num_dropped_empty=num_dropped_empty,
            num_duplicates=len(found) - len(by_digest),
            num_examples=len(chosen),
            num_train=len(train),
            num_mask=len(mask),
            num_held_out=len(held_out),
            num_truncated=sum(example.is_truncated for example in usable.values()),
            num_truncated_away=len(chosen) - len(usable),
            num_last_answer_only=sum(example.is_last_answer_only for example in usable.values()),
            num_train_tokens=sum(example.num_used_tokens for example in train),
            num_label_tokens=sum(example.num_label_tokens for example in train),
        ),
    )


def _usable(
    chosen: Mapping[bytes, Conversation | Preference],
    objective: Objective,
    tokenizer: "PreTrainedTokenizerBase",
    template: ChatTemplate | None,
    max_length: int,
) -> dict[bytes, Example]:
    """The examples that have anything to learn within `max_length`, by digest."""
    examples: list[Example] = []
    if objective == "sft":
        texts = (text for text in chosen.values() if isinstance(text, Conversation))
        examples += encode_all(texts, tokenizer, template, max_length)
    elif template is not None:
        pairs = (pair for pair in chosen.values() if isinstance(pair, Preference))
        examples += (measure(pair, objective, tokenizer, template, max_length) for pair in pairs)
    by_digest = zip(chosen, examples, strict=True)
    usable = {key: example for key, example in by_digest if example.is_usable}
    if not usable:
        longest = max(example.num_prompt_tokens for example in examples)
        raise DataError(
            f"Prompts must leave room for an answer in {max_length} tokens, got only examples that "
            f"are too long, with prompts of up to {longest} tokens; raise `--max-length`, or use a "
            "model with more positions."
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
    # Drawn by hash, not by a random generator, so that the order of the file does not matter.
    salt = f"hold out {options.split_seed}".encode()
    drawn = sorted(keys, key=lambda key: hashlib.sha256(salt + key).digest())
    return set(drawn[:count]), set(drawn[count : count + num_for_mask])


def _check_labels(train: Sequence[Example]) -> None:
    rated = [each.preference.is_good for each in train if isinstance(each, MeasuredPreference)]
    if set(rated) in ({True}, {False}):
        raise DataError(
            "Rated answers must be good and bad, got only good or only bad ones to train on; check "
            "the labels, or give more data."
        )


def _to_dataset(examples: Iterable[Example]) -> "datasets.Dataset":
    from datasets import Dataset

    return Dataset.from_list([example.row() for example in examples])
