# SPDX-License-Identifier: Apache-2.0
"""From the name of a data set to tokenised examples for training and for the held-out loss.

TRL takes a data set with `input_ids` and `labels` as it is, so what the loss of supervised
fine-tuning counts is decided here. Duplicates go before the split, so that no held-out example is
trained.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from keylayers.data.chat import ChatTemplate, Encoded, encode_all, resolve_template
from keylayers.data.formats import Conversation
from keylayers.data.options import DataOptions
from keylayers.data.preference_data import prepare_preferences
from keylayers.data.prepared import DataCounts, PreparedData, hash_all, hold_out
from keylayers.data.reading import read_conversations
from keylayers.errors import ConfigError, DataError
from keylayers.model.options import Objective

if TYPE_CHECKING:
    import datasets
    import transformers

__all__ = ["DataCounts", "PreparedData", "prepare"]


def prepare(
    options: DataOptions,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    max_positions: int | None = None,
    objective: Objective = "sft",
) -> PreparedData:
    """The examples, split, and tokenised unless the objective's trainer does that.

    Args:
        options: what to read, and how.
        tokenizer: of the model that is trained; stays as it is.
        max_positions: the longest sequence that the model takes, in tokens.
        objective: what the examples are to train.

    Raises:
        DataError: the data cannot be read, recognised, rendered or split, or are no data for the
            objective.
        ConfigError: an option cannot be used, or has no effect on this data.
    """
    if objective != "sft":
        return prepare_preferences(options, objective, tokenizer, max_positions)
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
    held_out, mask = hold_out(list(usable), options)
    train = [one for key, one in usable.items() if key not in held_out and key not in mask]
    return PreparedData(
        train=_to_dataset(train),
        mask=_to_dataset([one for key, one in usable.items() if key in mask]) if mask else None,
        held_out=_to_dataset([one for key, one in usable.items() if key in held_out]),
        options=options,
        format=format,
        chat_template=template,
        max_length=max_length,
        content_sha256=hash_all(chosen),
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


def _to_dataset(examples: Sequence[Encoded]) -> "datasets.Dataset":
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "input_ids": [one.input_ids for one in examples],
            "labels": [one.labels for one in examples],
        }
    )
