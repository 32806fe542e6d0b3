# SPDX-License-Identifier: Apache-2.0
"""What losses are measured on: a fine-tune's held-out examples, and text that it may forget."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keylayers.data.chat import IGNORED, encode_all
from keylayers.data.prepare import prepare
from keylayers.data.reading import read_conversations
from keylayers.data.templates import resolve_template
from keylayers.errors import DataError, LossError, ModelError
from keylayers.evaluation.documents import Measured
from keylayers.evaluation.options import LossOptions
from keylayers.evaluation.subjects import Loaded
from keylayers.files import json_sha256
from keylayers.model.loading import check_tokens, max_positions
from keylayers.progress import OnStep

Tokens: TypeAlias = tuple[list[int], list[int]]  # `input_ids` and `labels`, not shifted

GAIN, FORGETTING = "held-out data", "forgetting"
METRIC = "loss"
MIN_TOKENS = 2  # the first is predicted by nothing
MAX_TOKEN_CHARACTERS = 16  # more than a token has on average; bounds what is read of a large file
NUM_COMPARED = 20  # examples that every model's tokenizer must cut as the base model's does


@dataclass(frozen=True)
class Examples:
    """Examples of one data set, as tokens of the base model."""

    name: str  # `GAIN` or `FORGETTING`
    tokens: tuple[Tokens, ...]
    tokenizer: PreTrainedTokenizerBase
    source: dict[str, Any]  # where they come from, for the record
    batch_size: int

    @property
    def num_steps(self) -> int:
        """Batches of one pass."""
        return -(-len(self.tokens) // self.batch_size)

    def record(self) -> dict[str, Any]:
        """Where the examples come from."""
        return {"kind": "loss", **self.source}

    def inputs_sha256(self, loaded: Loaded) -> str:
        """The hash of all tokens and labels, which must be those of the model's tokenizer, too."""
        for ids, _ in self.tokens[:NUM_COMPARED]:
            text = self.tokenizer.decode(ids)
            own, base = (
                tokenizer.encode(text, add_special_tokens=False)
                for tokenizer in (loaded.tokenizer, self.tokenizer)
            )
            if own != base:
                raise ModelError(
                    f"models must share a tokenizer to compare losses per token, but "
                    f"{loaded.source!r} tokenises text differently from the base model; leave out "
                    f"`data` and `forgetting_data`, or evaluate it separately"
                )
        return json_sha256([self.name, self.tokens])

    def measured(self, loaded: Loaded, on_step: OnStep) -> Measured:
        """The loss of a model, example by example."""
        found = self._losses(loaded, on_step)
        if not all(math.isfinite(nats) for nats, _ in found):
            raise LossError(
                f"the loss must be a finite number, but {loaded.source!r} gives NaN or infinity on "
                f"{self.name}; its weights are damaged, or `dtype` is too narrow"
            )
        rows = pd.DataFrame(
            {
                "task": self.name,
                "metric": METRIC,
                "document": range(len(found)),
                "document_sha256": [json_sha256(example)[:16] for example in self.tokens],
                "value": [nats for nats, _ in found],
                "size": [float(num) for _, num in found],
                "chance": float("nan"),
            }
        )
        total = rows["value"].sum() / rows["size"].sum()
        return Measured(self.name, rows, {METRIC: float(total)}, {METRIC: False})

    def _losses(self, loaded: Loaded, on_step: OnStep) -> list[tuple[float, int]]:
        """The loss of each example in nats, summed over its labelled tokens, and their number."""
        # The longest first: what does not fit into memory shows at once, and little is padding.
        order = sorted(range(len(self.tokens)), key=lambda index: -len(self.tokens[index][0]))
        found: dict[int, tuple[float, int]] = {}
        for step in range(self.num_steps):
            chosen = order[step * self.batch_size :][: self.batch_size]
            batch = [self.tokens[index] for index in chosen]
            losses = example_losses(*predictions(batch, loaded.model))
            found |= dict(zip(chosen, losses, strict=True))
            mean = sum(nats for nats, _ in losses) / max(1, sum(num for _, num in losses))
            on_step(step + 1, mean)
        return [found[index] for index in range(len(self.tokens))]


def examples_of(options: LossOptions, base: Loaded, batch_size: int) -> Iterator[Examples]:
    """The data sets that the options name, in tokens of the base model."""
    tokenizer, longest = base.tokenizer, max_positions(base.model)
    if options.data is not None:
        prepared = prepare(options.data_options(options.data), tokenizer, longest)
        check_tokens(base.model, tokenizer, prepared.max_id)
        held_out = tuple((each["input_ids"], each["labels"]) for each in prepared.held_out)
        yield Examples(GAIN, held_out, tokenizer, prepared.record(), batch_size)
    if (source := options.forgetting_data) is not None:
        length = min(options.max_length, longest or options.max_length)
        read = _pieces if source.lower().endswith(".txt") else _conversations
        tokens = tuple(read(source, options, tokenizer, length))
        if len(tokens) < 2:
            raise DataError(
                f"`forgetting_data` must hold at least two examples with something to predict, got "
                f"{len(tokens)} in {source!r}; give more text, or a smaller `max_length`"
            )
        check_tokens(base.model, tokenizer, max(max(ids) for ids, _ in tokens))
        record = {"name": source, "num_examples": len(tokens), "max_length": length}
        yield Examples(FORGETTING, tokens, tokenizer, record, batch_size)


def _conversations(
    source: str, options: LossOptions, tokenizer: PreTrainedTokenizerBase, length: int
) -> Iterator[Tokens]:
    """Data in any format, without duplicates."""
    # `format` describes the fine-tune's data, not this text.
    found = read_conversations(replace(options.data_options(source), format=None))
    chosen = list({example.digest(): example for example in found.examples}.values())
    is_chat = found.format != "text"
    template = resolve_template(tokenizer, options.chat_template) if is_chat else None
    for own in encode_all(chosen[: options.forgetting_examples], tokenizer, template, length):
        if own.is_usable:
            yield own.row["input_ids"], own.row["labels"]


def _pieces(
    source: str, options: LossOptions, tokenizer: PreTrainedTokenizerBase, length: int
) -> Iterator[Tokens]:
    """A plain text, cut into pieces of `length` tokens that are read one by one."""
    at_most = options.forgetting_examples
    try:
        with Path(source).expanduser().open(encoding="utf-8") as file:
            text = file.read(at_most * length * MAX_TOKEN_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"`forgetting_data` must be a readable text in UTF-8, but {source!r} is not: {error}"
        ) from error
    ids = tokenizer(text, verbose=False)["input_ids"]
    pieces = (ids[start : start + length] for start in range(0, len(ids), length))
    for piece in [piece for piece in pieces if len(piece) >= MIN_TOKENS][:at_most]:
        yield piece, piece


@torch.no_grad()
def predictions(
    examples: Sequence[Tokens], model: PreTrainedModel | PeftModel
) -> tuple[Tensor, Tensor]:
    """Logits of shape (examples, tokens, vocabulary), and the labels that they predict."""
    # Padded on the right, which no label and no earlier token sees.
    rows = [torch.tensor(tokens) for tokens, _ in examples]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    labels = pad_sequence(
        [torch.tensor(label) for _, label in examples], batch_first=True, padding_value=IGNORED
    )
    logits = model(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False
    ).logits[:, :-1]
    return logits.float(), labels[:, 1:].to(logits.device)


def example_losses(logits: Tensor, labels: Tensor) -> list[tuple[float, int]]:
    """The loss of each example in nats, summed over its labelled tokens, and their number."""
    nats = cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(labels)
    counts = (labels != IGNORED).sum(dim=1).tolist()
    return list(zip(nats.double().sum(dim=1).tolist(), counts, strict=True))
