# SPDX-License-Identifier: Apache-2.0
"""The models of an evaluation, one after another: the base model, adapters on it, checkpoints.

The base model is loaded once. Each adapter is put on it and taken off again, with proof, so that
adapters of different kinds can be compared, and those that replace whole modules. One checkpoint at
a time is in memory, where those who measure let go of each before they ask for the next.
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
        name: In tables, different from all others.
        kind: What it is.
        source: Folder or name on the hub, as given.
    """

    name: str
    kind: Kind
    source: str


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to be measured, in evaluation mode.

    Attributes:
        subject: Which it is.
        model: With its adapter, if it has one.
        tokenizer: Its own; of an adapter the base model's.
        template: How it is spoken to.
        identity: Hash of what decides its results: weights, base and adapter together, how they
            are loaded, config, generation config and tokenizer.
        record: What a record says of it.
    """

    subject: Subject
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    identity: str
    record: dict[str, Any]

    def chat_tokenizer(self) -> PreTrainedTokenizerBase:
        """A tokenizer that renders chats by `template`; the model's own stays as it is."""
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.chat_template = self.template.text
        return tokenizer

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that it takes, in tokens, if its config says so."""
        return max_positions(self.model)


def subjects_of(model: ModelOptions, compared: ComparedOptions) -> list[Subject]:
    """The base model, then the adapters, then the checkpoints, each under a name of its own.

    Raises:
        ConfigError: two have the same name.
    """
    sources = (*compared.adapter, *compared.checkpoint)
    names = _names(sources)
    kinds: list[Kind] = ["adapter"] * len(compared.adapter)
    kinds += ["checkpoint"] * len(compared.checkpoint)
    for name, source in zip(names, sources, strict=True):
        if [*names, BASE].count(name) > 1:
            raise ConfigError(
                f"every model must have a name of its own in the table, but {source!r} has that of "
                f"another, {name!r}; rename its folder"
            )
    others = [Subject(*one) for one in zip(names, kinds, sources, strict=True)]
    return [Subject(BASE, "base", model.model), *others]


def _names(sources: Sequence[str]) -> list[str]:
    """As many of the last parts of each path as tell all apart, and them from the base model."""
    parts = [
        [part for part in Path(one).parts if part not in ("/", ".")] or [one] for one in sources
    ]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len({*names, BASE}) == len(names) + 1:
            return names
    return list(sources)


def each_model(
    subjects: Sequence[Subject], source: ModelOptions, template: str | None
) -> Iterator[Loaded]:
    """Every model in turn; one that was given is no longer to be used when the next is asked for.

    Args:
        subjects: From `subjects_of`.
        source: The base model, and how all are loaded.
        template: Chat template by name, for models of their own tokenizer too.

    Raises:
        KeylayersError: a model, adapter or tokenizer is missing or does not fit.
    """
    checkpoints = [one for one in subjects if one.kind == "checkpoint"]
    yield from _base_and_adapters(
        [one for one in subjects if one.kind != "checkpoint"], source, template
    )
    for subject in checkpoints:
        # The revision is the base model's own.
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
    # without this question a build of PyTorch for CUDA names one where there is none
    is_there = torch.accelerator.is_available()
    if is_there and not source.load_in_4bit:  # which is where it belongs already
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
    """Give a model to PEFT, which replaces parts of it, and take it back as it was.

    PEFT's own `unload` leaves modules that an adapter holds whole in the model.

    Raises:
        GuardError: a weight of the model changed meanwhile.
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
