# SPDX-License-Identifier: Apache-2.0
"""What losses are measured on: a fine-tune's held-out examples, and text that it may forget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from keylayers.data.chat import encode_all, resolve_template
from keylayers.data.prepare import prepare
from keylayers.data.reading import read_conversations
from keylayers.errors import DataError, LossError, ModelError
from keylayers.evaluation.documents import Measured
from keylayers.evaluation.loss import example_losses
from keylayers.evaluation.options import LossOptions
from keylayers.evaluation.subjects import Loaded
from keylayers.files import json_sha256
from keylayers.progress import OnStep

GAIN, FORGETTING = "held-out data", "forgetting"
METRIC = "loss"
MIN_TOKENS = 2  # the first is predicted by nothing
MAX_TOKEN_CHARACTERS = 16  # more than a token has on average; bounds what is read of a large file


@dataclass(frozen=True)
class Examples:
    """Examples of one data set, as tokens of the base model.

    Attributes:
        name: `GAIN` or `FORGETTING`.
        tokens: `input_ids` and `labels` of each example.
        probes: Texts with their tokens, which every model's tokenizer must reproduce.
        source: Where they come from, for the record.
        batch_size: Examples in one batch.
    """

    name: str
    tokens: tuple[tuple[list[int], list[int]], ...]
    probes: Mapping[str, list[int]]
    source: dict[str, Any]
    batch_size: int

    @property
    def note(self) -> str:
        """How many examples there are."""
        source = self.source.get("data") or self.source["name"]
        return f"{self.name}: {len(self.tokens)} examples of {source!r}"

    @property
    def num_batches(self) -> int:
        """Batches of one pass."""
        return -(-len(self.tokens) // self.batch_size)

    def record(self) -> dict[str, Any]:
        """Where the examples come from."""
        return {"kind": "loss", **self.source}

    def inputs_sha256(self, loaded: Loaded) -> str:
        """The hash of all tokens and labels.

        Raises:
            ModelError: the model's tokenizer gives other tokens than the base model's.
        """
        for text, ids in self.probes.items():
            if loaded.tokenizer.encode(text, add_special_tokens=False) != ids:
                raise ModelError(
                    f"losses per token can be compared only between models of one tokenizer, but "
                    f"{loaded.subject.source!r} cuts text into other tokens than the base model; "
                    f"leave out `data` and `forgetting_data`, or evaluate it separately"
                )
        return json_sha256([self.name, self.tokens])

    def measured(self, loaded: Loaded, on_step: OnStep) -> Measured:
        """The loss of a model, example by example.

        Raises:
            LossError: it is not finite.
        """
        found = example_losses(
            loaded.model, self.tokens, batch_size=self.batch_size, on_step=on_step
        )
        if not all(math.isfinite(nats) for nats, _ in found):
            raise LossError(
                f"the loss must be a finite number, but {loaded.subject.source!r} gives NaN or "
                f"infinity on {self.name}; its weights are damaged, or `dtype` is too narrow"
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


def examples_of(options: LossOptions, loaded: Loaded, batch_size: int) -> list[Examples]:
    """The data sets that the options name, in tokens of the base model.

    Raises:
        KeylayersError: data cannot be read, or hold nothing to measure.
    """
    found = []
    if options.data is not None:
        found.append(_held_out(options, loaded, batch_size))
    if options.forgetting_data is not None:
        found.append(_forgetting(options, loaded, batch_size))
    return found


def _held_out(options: LossOptions, loaded: Loaded, batch_size: int) -> Examples:
    data = options.data_options(options.data or "")
    prepared = prepare(data, loaded.tokenizer, loaded.max_positions)
    tokens = tuple((example["input_ids"], example["labels"]) for example in prepared.held_out)
    return Examples(GAIN, tokens, _probes(loaded, tokens), prepared.record(), batch_size)


def _forgetting(options: LossOptions, loaded: Loaded, batch_size: int) -> Examples:
    source, length = options.forgetting_data or "", options.max_length
    length = min(length, loaded.max_positions or length)
    if source.lower().endswith(".txt"):
        tokens = _pieces(Path(source), loaded, length, options.forgetting_examples)
    else:
        # `format` describes the fine-tune's data, not this text.
        format, found, _ = read_conversations(replace(options.data_options(source), format=None))
        chosen = list({example.digest(): example for example in found}.values())
        template = None
        if format != "text":
            template = resolve_template(loaded.tokenizer, options.chat_template)
        encoded = encode_all(
            chosen[: options.forgetting_examples], loaded.tokenizer, template, length
        )
        tokens = tuple(
            (example.input_ids, example.labels) for example in encoded if example.num_label_tokens
        )
    if len(tokens) < 2:
        raise DataError(
            f"`forgetting_data` must hold at least two examples with something to predict, got "
            f"{len(tokens)} in {source!r}; give more text, or a smaller `max_length`"
        )
    record = {"name": source, "num_examples": len(tokens), "max_length": length}
    return Examples(FORGETTING, tokens, _probes(loaded, tokens), record, batch_size)


def _pieces(
    path: Path, loaded: Loaded, length: int, at_most: int
) -> tuple[tuple[list[int], list[int]], ...]:
    """A plain text, cut into pieces of `length` tokens that are read one by one."""
    try:
        with path.expanduser().open(encoding="utf-8") as file:
            text = file.read(at_most * length * MAX_TOKEN_CHARACTERS)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"`forgetting_data` must be a readable text in UTF-8, but {str(path)!r} is not: {error}"
        ) from error
    ids = loaded.tokenizer(text, verbose=False)["input_ids"]
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    usable = [piece for piece in pieces if len(piece) >= MIN_TOKENS][:at_most]
    return tuple((piece, list(piece)) for piece in usable)


def _probes(loaded: Loaded, tokens: Sequence[tuple[list[int], list[int]]]) -> dict[str, list[int]]:
    """Some examples as text, with the tokens that the base model's tokenizer gives."""
    texts = [loaded.tokenizer.decode(ids) for ids, _ in tokens[:20]]
    return {text: loaded.tokenizer.encode(text, add_special_tokens=False) for text in texts}
