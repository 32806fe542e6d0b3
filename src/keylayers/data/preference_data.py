# SPDX-License-Identifier: Apache-2.0
"""From the name of a data set to preferences for TRL's trainers, in the same three splits.

The trainers render and tokenise; here it is only measured how long the parts are, so that what a
trainer would drop or empty by cutting is left out and counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from keylayers.data.chat import ChatTemplate, render, resolve_template
from keylayers.data.formats import Message
from keylayers.data.options import DataOptions
from keylayers.data.preferences import (
    Preference,
    PreferenceFormat,
    preferences,
    require_preferences,
)
from keylayers.data.prepared import DataCounts, PreparedData, hash_all, hold_out
from keylayers.data.reading import opened
from keylayers.errors import ConfigError, DataError
from keylayers.model.options import Objective

if TYPE_CHECKING:
    import datasets
    import transformers

FORMAT_OF: dict[Objective, PreferenceFormat] = {
    "dpo": "pairs",
    "kto": "rated",
    "orpo": "pairs",
    "reward": "pairs",
}
ADDED_TOKENS = 2  # a start and an end token that ORPO's trainer adds where there are none


@dataclass(frozen=True)
class _Measured:
    """How long a preference is, in tokens."""

    preference: Preference
    num_prompt_tokens: int
    num_tokens: tuple[int, ...]
    """Of the prompt with each answer."""


def prepare_preferences(
    options: DataOptions,
    objective: Objective,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    max_positions: int | None = None,
) -> PreparedData:
    """The preferences as messages, split.

    Args:
        options: what to read, and how.
        objective: one that learns from preferences.
        tokenizer: of the model that is trained; stays as it is.
        max_positions: the longest sequence that the model takes, in tokens.

    Raises:
        DataError: the data cannot be read, recognised, rendered or split.
        ConfigError: an option cannot be used, or has no effect on this data.
    """
    format = FORMAT_OF[objective]
    found, num_dropped_empty = _read(options, objective, format)
    template = resolve_template(tokenizer, options.chat_template)
    max_length = min(options.max_length, max_positions or options.max_length)
    distinct = {one.digest(): one for one in found}
    chosen = list(distinct)[: options.max_examples]
    measured = {key: _measure(distinct[key], tokenizer, template) for key in chosen}
    usable = {key: one for key, one in measured.items() if _fits(one, max_length, objective)}
    if not usable:
        longest = max(one.num_prompt_tokens for one in measured.values())
        raise DataError(
            f"Prompts must leave room for an answer in {max_length} tokens, got only preferences "
            f"that are too long, with prompts of up to {longest} tokens; raise `--max-length`, or "
            "use a model with more positions."
        )
    held_out, mask = hold_out(list(usable), options)
    train = [key for key in usable if key not in held_out and key not in mask]
    _check_labels([usable[key].preference for key in train], format)
    return PreparedData(
        train=_to_dataset(usable, train),
        mask=_to_dataset(usable, [key for key in usable if key in mask]) if mask else None,
        held_out=_to_dataset(usable, [key for key in usable if key in held_out]),
        options=options,
        format=format,
        chat_template=template,
        max_length=max_length,
        content_sha256=hash_all(chosen),
        counts=DataCounts(
            num_dropped_empty=num_dropped_empty,
            num_duplicates=len(found) - len(distinct),
            num_examples=len(chosen),
            num_train=len(train),
            num_mask=len(mask),
            num_held_out=len(held_out),
            num_truncated_away=len(chosen) - len(usable),
            **_count(usable, train, max_length),
        ),
    )


def _read(
    options: DataOptions, objective: Objective, format: PreferenceFormat
) -> tuple[list[Preference], int]:
    if options.format is not None:
        raise ConfigError(
            f"`format` must be left out with `objective` {objective}, whose columns decide, got "
            f"{options.format!r}"
        )
    with opened(options) as table:
        require_preferences(format, objective, table.columns)
        found, num_dropped_empty = preferences(table.rows(), format)
    if not found:
        raise DataError(
            f"The data must hold prompts with answers, got {num_dropped_empty} rows without; check "
            "the columns."
        )
    return found, num_dropped_empty


def _measure(
    preference: Preference,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    template: ChatTemplate,
) -> _Measured:
    def length(messages: Sequence[Message], *, prompt: bool = False) -> int:
        text, _ = render(messages, tokenizer, template, prompt=prompt)
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    prompt = preference.prompt
    whole = tuple(length([*prompt, *answer]) for answer in preference.answers)
    return _Measured(preference, length(prompt, prompt=True), whole)


def _fits(one: _Measured, max_length: int, objective: Objective) -> bool:
    """Whether the trainer would use it: a reward model must see the whole of both answers."""
    if objective == "reward":
        return max(one.num_tokens) <= max_length
    return one.num_prompt_tokens + ADDED_TOKENS <= max_length


def _check_labels(train: Sequence[Preference], format: PreferenceFormat) -> None:
    if format == "rated" and len({one.is_good for one in train}) < 2:
        raise DataError(
            "Rated answers must be good and bad, got only one of both to train; check the labels, "
            "or give more data."
        )


def _count(
    usable: dict[bytes, _Measured], train: Sequence[bytes], max_length: int
) -> dict[str, int]:
    """The part of the counts that follows from the tokens; a pair has two sequences."""
    sequences = [
        (min(whole, max_length), one.num_prompt_tokens)
        for one in (usable[key] for key in train)
        for whole in one.num_tokens
    ]
    return {
        "num_truncated": sum(max(one.num_tokens) > max_length for one in usable.values()),
        "num_last_answer_only": 0,
        "num_train_tokens": sum(whole for whole, _ in sequences),
        "num_label_tokens": sum(max(0, whole - prompt) for whole, prompt in sequences),
    }


def _to_dataset(usable: dict[bytes, _Measured], keys: Sequence[bytes]) -> "datasets.Dataset":
    from datasets import Dataset

    return Dataset.from_list([usable[key].preference.row() for key in keys])
