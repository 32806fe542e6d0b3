# SPDX-License-Identifier: Apache-2.0
"""The models of an evaluation, one after the other: the base model, adapters on it, checkpoints.

The base model is loaded once. Each adapter is put on it and taken off again, and the weights are
compared afterwards. One checkpoint at a time is in memory, if the caller drops each model before it
asks for the next.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keylayers.data.templates import ChatTemplate, resolve_template
from keylayers.evaluation.options import BASE, ComparedOptions
from keylayers.files import json_sha256
from keylayers.model.loading import describe, load_adapter, load_model, load_tokenizer
from keylayers.model.options import ModelOptions
from keylayers.model.preserve import preserved, to_evaluation
from keylayers.model.weights import tensors_sha256, weights_sha256

Kind = Literal["base", "adapter", "checkpoint"]
# Where a config comes from; it decides nothing.
WITHOUT_EFFECT = {"_name_or_path", "name_or_path", "_commit_hash", "transformers_version"}
OF_ADAPTER = {"base_model_name_or_path", "revision", "inference_mode"}


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode."""

    name: str  # unique, in tables
    kind: Kind
    source: str  # folder or name on the hub, as given
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase  # the base model's for an adapter
    template: ChatTemplate
    identity: str  # hash of all that decides its results: weights, dtype, configs, tokenizer
    record: dict[str, Any]  # what the record of the evaluation says about it


def each_model(
    source: ModelOptions, compared: ComparedOptions, template: str | None
) -> Iterator[Loaded]:
    """The base model, the adapters, the checkpoints. Drop each before you ask for the next."""
    yield from _base_and_adapters(source, compared, template)
    for checkpoint in compared.checkpoint:  # the revision is that of the base model
        options = replace(source, model=checkpoint, revision=None)
        yield _load(compared.names[checkpoint], "checkpoint", options, template)


def _base_and_adapters(
    source: ModelOptions, compared: ComparedOptions, template: str | None
) -> Iterator[Loaded]:
    base = _load(BASE, "base", source, template)
    assert isinstance(base.model, PreTrainedModel)
    yield base
    for adapter in compared.adapter:
        # Not `PeftModel.unload`: that of peft 0.21 leaves `modules_to_save` in the base model.
        with preserved(base.model):
            tuned = load_adapter(base.model, adapter)
            to_evaluation(tuned)
            weights = get_peft_model_state_dict(tuned, save_embedding_layers=False)
            sha256 = tensors_sha256(sorted(weights.items()))
            config = _text(tuned.peft_config["default"].to_dict(), OF_ADAPTER)
            yield replace(
                base,
                name=compared.names[adapter],
                kind="adapter",
                source=adapter,
                model=tuned,
                identity=json_sha256([base.identity, sha256, config]),
                record={"name": adapter, "adapter_sha256": sha256},
            )


def _load(name: str, kind: Kind, source: ModelOptions, template: str | None) -> Loaded:
    tokenizer = load_tokenizer(source)
    model = load_model(source)
    # `current_accelerator` alone names a device that is absent, in builds of PyTorch for CUDA.
    if torch.accelerator.is_available() and not source.load_in_4bit:  # 4-bit: moved when loaded
        model = model.to(torch.accelerator.current_accelerator())
    to_evaluation(model)
    hashes = {
        "weights_sha256": weights_sha256(model),
        "config_sha256": config_sha256(model, tokenizer),
    }
    record = describe(source, model) | hashes
    identity = json_sha256([hashes, record["dtype"], source.load_in_4bit])
    chat = resolve_template(tokenizer, template)
    return Loaded(name, kind, source.model, model, tokenizer, chat, identity, record)


def config_sha256(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """The hash of config, generation config and tokenizer, without where they come from.

    The chat template is not part of it: prompts are hashed as they are rendered.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in pure Python
        rules = {"kind": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:  # truncation and padding are those of its last call
        rules = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    about = {
        "config": model.config.to_dict(),
        "generation_config": model.generation_config.to_dict() if model.can_generate() else None,
        "tokenizer": rules,
        "special_tokens": tokenizer.special_tokens_map,
        "clean_up_tokenization_spaces": getattr(tokenizer, "clean_up_tokenization_spaces", None),
    }
    return json_sha256(_text(about, WITHOUT_EFFECT))


def _text(content: dict[str, Any], left_out: set[str]) -> str:
    """Canonical JSON without some keys; infinite numbers are allowed, unlike in `json_sha256`."""

    def plain(value: Any) -> Any:
        return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)

    def relevant(part: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in part.items() if name not in left_out}

    parsed = json.loads(json.dumps(content, default=plain), object_hook=relevant)
    return json.dumps(parsed, sort_keys=True)
