# SPDX-License-Identifier: Apache-2.0
"""From the name of a data set to examples for training, for the scores and for the held-out loss.

Supervised fine-tuning gets `input_ids` and `labels`, which TRL takes as they are, so keylayers
decides what the loss counts. Preferences stay messages, which TRL's trainers tokenise. Duplicates
are removed before the split. Only content and seed decide which examples are held out, not the
order in the file, nor whether others are set aside for the mask.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from datasets import Dataset, Features, Json, Value
from transformers import PreTrainedTokenizerBase

from keylayers.data.chat import Example, encode_all, measure_all
from keylayers.data.formats import Conversation
from keylayers.data.options import DataOptions
from keylayers.data.preferences import Preference
from keylayers.data.reading import Found, read_conversations, read_preferences
from keylayers.data.templates import ChatTemplate, resolve_template
from keylayers.data.turns import in_row, other_fields
from keylayers.errors import ConfigError, DataError
from keylayers.files import json_sha256
from keylayers.model.options import Objective

_TURNS = ("prompt", "chosen", "rejected", "completion")  # columns of preferences


@dataclass(frozen=True)
class DataCounts:
    """Numbers of examples, by what became of them; tokens are those of the training examples."""

    num_dropped_empty: int  # without an answer, or with an empty one
    num_duplicates: int
    num_equal_pairs: int  # of two equal answers, which prefer nothing
    num_examples: int  # left after that and `max_examples`, before too long ones are left out
    num_train: int
    num_mask: int  # set aside for the mask; 0 if it is learned on the training examples
    num_held_out: int
    num_truncated: int  # used without their end
    num_truncated_away: int  # not used: the prompt alone fills `max_length`
    num_empty_answers: int  # in conversations, which the loss leaves out
    num_masked_answers: int  # that the loss leaves out because the data say so
    num_last_answer_only: int  # the loss counts the last answer only: the template hides the others
    num_train_tokens: int
    num_label_tokens: int  # that the loss counts


@dataclass(frozen=True)
class PreparedData:
    """Examples in the columns that the objective's trainer takes, and where they come from."""

    train: Dataset
    mask: Dataset | None  # None if the mask is learned on `train`
    held_out: Dataset  # neither training nor scoring sees them
    options: DataOptions
    format: str
    chat_template: ChatTemplate | None  # None for plain text
    max_length: int  # in tokens: `options.max_length`, or the model's own limit
    content_sha256: str  # of the examples that were used, in order
    counts: DataCounts
    unused: tuple[str, ...]  # what the data hold and nothing uses, in words
    max_id: int  # the highest token of all examples

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

    def evaluation(self) -> dict[str, Dataset]:
        """The examples that are not trained on: `held_out`, and `mask` if there is one."""
        parts = {"held_out": self.held_out, "mask": self.mask}
        return {name: part for name, part in parts.items() if part is not None}

    def summary(self) -> list[str]:
        """A few lines for users: how many examples are used, and what was left out."""
        counts = self.counts
        template = f", chat template {self.chat_template.name!r}" if self.chat_template else ""
        for_mask = f", {counts.num_mask} for the mask" if counts.num_mask else ""
        lines = [
            f"{counts.num_train} examples to train{for_mask} and {counts.num_held_out} held out "
            f"(format {self.format!r}{template}, up to {self.max_length} tokens, the loss on "
            f"{counts.num_label_tokens} of {counts.num_train_tokens} tokens)"
        ]
        answers = _counted(
            ("empty", counts.num_empty_answers),
            ("marked as not to be learned", counts.num_masked_answers),
        )
        lines += [f"answers that the loss leaves out: {answers}"] if answers else []
        lines += [f"not used: {name}" for name in self.unused]
        left_out = _counted(
            ("without an answer", counts.num_dropped_empty),
            ("duplicates", counts.num_duplicates),
            ("pairs of equal answers", counts.num_equal_pairs),
            ("cut at the end", counts.num_truncated),
            ("too long for any answer", counts.num_truncated_away),
            ("with the loss on the last answer only", counts.num_last_answer_only),
        )
        lines += [f"of the data: {left_out}"] if left_out else []
        if self.max_length < self.options.max_length:
            lines.append(
                f"max_length {self.options.max_length} lowered to the {self.max_length} positions "
                "that the model has"
            )
        return lines


def _counted(*reasons: tuple[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in reasons if number)


def prepare(
    options: DataOptions,
    tokenizer: PreTrainedTokenizerBase,
    max_positions: int | None = None,
    objective: Objective = "sft",
) -> PreparedData:
    """The examples for an objective, split; `max_positions` is the model's limit in tokens."""
    read: Found[Conversation] | Found[Preference] = (
        read_conversations(options) if objective == "sft" else read_preferences(options, objective)
    )
    format, found = read.format, [each for each in read.examples if not each.is_equal]
    if not found:
        raise DataError(
            f"Pairs must have different answers, got {len(read.examples)} of equal ones; check "
            "`chosen` and `rejected`."
        )
    if format == "text" and options.chat_template is not None:
        raise ConfigError(
            "`chat_template` works on conversations, got plain text; leave the option out."
        )
    template = None if format == "text" else resolve_template(tokenizer, options.chat_template)
    unused = unused_parts(read, template)
    max_length = min(options.max_length, max_positions or options.max_length)
    by_digest = {each.digest(): each for each in found}
    chosen = dict(list(by_digest.items())[: options.max_examples])
    conversations = [each for each in chosen.values() if isinstance(each, Conversation)]
    preferences = (each for each in chosen.values() if isinstance(each, Preference))
    examples = list(encode_all(conversations, tokenizer, template, max_length))
    if template is not None:
        examples += measure_all(preferences, objective, tokenizer, template, max_length)
    usable = {key: each for key, each in zip(chosen, examples, strict=True) if each.is_usable}
    if not usable:
        longest = max(example.num_prompt_tokens for example in examples)
        raise DataError(
            f"Prompts must leave room for an answer in {max_length} tokens, got only examples that "
            f"are too long, with prompts of up to {longest} tokens; raise `--max-length`, or use a "
            "model with more positions."
        )
    held_out, mask = _hold_out(list(usable), options)
    train = [example for key, example in usable.items() if key not in held_out | mask]
    if {example.row.get("label") for example in train} in ({True}, {False}):
        raise DataError(
            "Rated answers must be good and bad, got only good or only bad ones to train on; check "
            "the labels, or give more data."
        )
    if num_lost := sum(example.num_lost for example in usable.values()):
        unused += (f"a thought or text of {num_lost} answers, which the chat template leaves out",)
    return PreparedData(
        max_id=max(example.max_id for example in usable.values()),
        train=_to_dataset(train),
        mask=_to_dataset(usable[key] for key in usable if key in mask) if mask else None,
        held_out=_to_dataset(usable[key] for key in usable if key in held_out),
        options=options,
        format=format,
        chat_template=template,
        max_length=max_length,
        content_sha256=hashlib.sha256(b"".join(chosen)).hexdigest(),
        counts=DataCounts(
            num_dropped_empty=read.num_dropped_empty,
            num_duplicates=len(found) - len(by_digest),
            num_equal_pairs=len(read.examples) - len(found),
            num_examples=len(chosen),
            num_train=len(train),
            num_mask=len(mask),
            num_held_out=len(held_out),
            num_truncated=sum(example.is_truncated for example in usable.values()),
            num_truncated_away=len(chosen) - len(usable),
            num_empty_answers=sum(each.num_empty for each in conversations),
            num_masked_answers=sum(each.num_masked for each in conversations),
            num_last_answer_only=sum(example.is_last_answer_only for example in usable.values()),
            num_train_tokens=sum(example.num_used_tokens for example in train),
            num_label_tokens=sum(example.num_label_tokens for example in train),
        ),
        unused=unused,
    )


def unused_parts(
    found: Found[Conversation] | Found[Preference], template: ChatTemplate | None
) -> tuple[str, ...]:
    """Columns that no format reads, and fields and tools that the template ignores, in words."""
    parts = [f"columns {', '.join(found.unused_columns)}"] if found.unused_columns else []
    if template is None:
        return tuple(parts)
    fields: dict[str, None] = {}
    for example in found.examples:
        with in_row(example.row_number):
            _check_tools(example, template)
        fields |= dict.fromkeys(name for turn in example.messages for name in other_fields(turn))
    ignored = [name for name in fields if name != "weight" and not template.reads(name)]
    if ignored:
        parts.append(f"fields of turns {', '.join(ignored)}, which the chat template does not use")
    conversations = (each for each in found.examples if isinstance(each, Conversation))
    if not re.search(r"\btools\b", template.text) and any(each.tools for each in conversations):
        parts.append("tools, which the chat template does not use")
    return tuple(parts)


def _check_tools(example: Conversation | Preference, template: ChatTemplate) -> None:
    """Refuse turns and calls of tools with a template that would silently leave them out."""
    needed = ["tool"] if any(turn["role"] == "tool" for turn in example.messages) else []
    needed += ["tool_calls"] if any("tool_calls" in turn for turn in example.messages) else []
    if lacking := [name for name in needed if name not in template.text]:
        raise DataError(
            f"The chat template must render turns and calls of tools, but {template.name!r} "
            f"has no `{lacking[0]}`; choose another `--chat-template`, or remove such rows."
        )


def _hold_out(keys: Sequence[bytes], options: DataOptions) -> tuple[set[bytes], set[bytes]]:
    """The keys of the held-out examples, and of as many for the mask if it gets its own."""
    asked = options.held_out
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


def _to_dataset(examples: Iterable[Example]) -> Dataset:
    rows = [example.row for example in examples]
    turns = [name for name in _TURNS if name in rows[0]]
    if not any(other_fields(turn) for row in rows for name in turns for turn in row[name]):
        return Dataset.from_list(rows)
    # Without `Json`, Arrow gives every turn the fields of all, and templates take nulls for values.
    kinds = {"label": Value("bool"), **dict.fromkeys(turns, Json())}
    return Dataset.from_list(rows, features=Features({name: kinds[name] for name in rows[0]}))
