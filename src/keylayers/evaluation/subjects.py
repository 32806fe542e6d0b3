# SPDX-License-Identifier: Apache-2.0
"""The models of an evaluation, one after the other: the base model, adapters on it, checkpoints.

The base model is loaded once. Each adapter is put on it and taken off again, and the weights are
compared afterwards. One checkpoint at a time is in memory, if the caller drops each model before it
asks for the next.
"""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keylayers.data.chat import ChatTemplate, resolve_template
from keylayers.errors import ConfigError, GuardError
from keylayers.evaluation.identity import config_sha256
from keylayers.evaluation.options import ComparedOptions
from keylayers.files import json_sha256
from keylayers.model.loading import (
    describe,
    load_adapter,
    load_model,
    load_tokenizer,
    max_positions,
)
from keylayers.model.options import ModelOptions
from keylayers.model.preserve import to_evaluation
from keylayers.model.weights import fingerprint, tensors_sha256, weights_sha256

BASE = "base model"
Kind = Literal["base", "adapter", "checkpoint"]


@dataclass(frozen=True)
class Subject:
    """One model of an evaluation.

    Attributes:
        name: Unique name in tables.
        kind: Base model, adapter or checkpoint.
        source: Folder or name on the hub, as given.
    """

    name: str
    kind: Kind
    source: str


@dataclass(frozen=True)
class Loaded:
    """A loaded model in evaluation mode.

    Attributes:
        subject: Which model it is.
        model: The model, with its adapter if it has one.
        tokenizer: Its tokenizer; the base model's for an adapter.
        template: Its chat template.
        identity: Hash of what decides its results: weights of base and adapter, dtype, config,
            generation config and tokenizer.
        record: What the record of the evaluation says about it.
    """

    subject: Subject
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    identity: str
    record: dict[str, Any]

    def chat_tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy of the tokenizer that renders chats with `template`."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.chat_template = self.template.text
        return tokenizer

    @property
    def max_positions(self) -> int | None:
        """The longest sequence of the model, in tokens, if its config says so."""
        return max_positions(self.model)


def subjects_of(model: ModelOptions, compared: ComparedOptions) -> list[Subject]:
    """The base model, then the adapters, then the checkpoints, each with a unique name.

    Raises:
        ConfigError: two have the same name.
    """
    sources = (*compared.adapter, *compared.checkpoint)
    kinds: list[Kind] = ["adapter"] * len(compared.adapter)
    kinds += ["checkpoint"] * len(compared.checkpoint)
    found = [Subject(BASE, "base", model.model)]
    for name, kind, source in zip(_names(sources), kinds, sources, strict=True):
        if name in [other.name for other in found]:
            raise ConfigError(
                f"every model must have a name of its own in the table, but {source!r} has that of "
                f"another, {name!r}; rename its folder"
            )
        found.append(Subject(name, kind, source))
    return found


def _names(sources: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that differ from each other and from the base model's name."""
    parts = [
        [part for part in Path(source).parts if part not in ("/", ".")] or [source]
        for source in sources
    ]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len({*names, BASE}) == len(names) + 1:
            return names
    return list(sources)


def each_model(
    subjects: Sequence[Subject], source: ModelOptions, template: str | None
) -> Iterator[Loaded]:
    """Load every model in turn. The previous model must not be used after asking for the next.

    Args:
        subjects: From `subjects_of`.
        source: The base model, and how all models are loaded.
        template: Name of the chat template, also for checkpoints.

    Raises:
        KeylayersError: a model, adapter or tokenizer is missing or does not fit.
    """
    yield from _base_and_adapters(
        [subject for subject in subjects if subject.kind != "checkpoint"], source, template
    )
    for subject in subjects:
        if subject.kind == "checkpoint":  # the revision is that of the base model
            yield _load(subject, replace(source, model=subject.source, revision=None), template)


def _base_and_adapters(
    subjects: Sequence[Subject], source: ModelOptions, template: str | None
) -> Iterator[Loaded]:
    base = _load(subjects[0], source, template)
    model = base.model
    assert isinstance(model, PreTrainedModel)
    yield base
    for subject in subjects[1:]:
        with lent(model):
            tuned = load_adapter(model, subject.source)
            to_evaluation(tuned)
            weights = get_peft_model_state_dict(tuned, save_embedding_layers=False)
            config = {
                name: sorted(value) if isinstance(value, set) else str(value)
                for name, value in tuned.peft_config["default"].to_dict().items()
                if name not in ("base_model_name_or_path", "revision", "inference_mode")
            }
            adapter = tensors_sha256(sorted(weights.items()))
            yield Loaded(
                subject,
                tuned,
                base.tokenizer,
                base.template,
                identity=json_sha256([base.identity, adapter, config]),
                record={"name": subject.source, "adapter_sha256": adapter},
            )


def _load(subject: Subject, source: ModelOptions, template: str | None) -> Loaded:
    tokenizer = load_tokenizer(source)
    model = load_model(source)
    # `current_accelerator` alone names a device that is absent, in builds of PyTorch for CUDA.
    if torch.accelerator.is_available() and not source.load_in_4bit:  # 4-bit: moved when loaded
        model = model.to(torch.accelerator.current_accelerator())
    to_evaluation(model)
    generation_config = model.generation_config.to_dict() if model.can_generate() else {}
    hashes = {
        "weights_sha256": weights_sha256(model),
        "config_sha256": config_sha256(model.config.to_dict(), generation_config, tokenizer),
    }
    record = describe(source, model) | hashes
    identity = json_sha256([hashes, record["dtype"], source.load_in_4bit])
    chat = resolve_template(tokenizer, template)
    return Loaded(subject, model, tokenizer, chat, identity, record)


@contextlib.contextmanager
def lent(model: PreTrainedModel) -> Iterator[None]:
    """Let PEFT replace parts of a model, and restore them afterwards.

    `PeftModel.unload` of peft 0.21 leaves modules of `modules_to_save` in the base model.

    Raises:
        GuardError: a weight of the model changed.
    """
    before = fingerprint(model.state_dict().items())
    modules = [(module, dict(vars(module)), dict(module._modules)) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes, parts in modules:
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(parts)
    after = fingerprint(model.state_dict().items())
    if after != before:
        changed = sorted(name for name in before if before[name] != after.get(name))
        raise GuardError(
            f"an adapter must leave the base model as it is, but {len(changed)} of its tensors "
            f"changed, first {changed[0] if changed else 'in number'}"
        )
