# SPDX-License-Identifier: Apache-2.0
"""The models that are judged: which they are, by all that decides answers, and how they chat."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from keylayers.data.chat import ChatTemplate, resolve_template
from keylayers.errors import ModelError
from keylayers.evaluation.identity import config_sha256
from keylayers.evaluation.judge.options import JudgedOptions
from keylayers.evaluation.options import ComparedOptions
from keylayers.evaluation.subjects import Kind, lent, subjects_of
from keylayers.files import json_sha256
from keylayers.model.loading import (
    ADAPTER_FILES,
    TOKENIZER_FILES,
    Checkpoint,
    check_folder,
    load_adapter,
    load_model,
    load_tokenizer,
    local_folder,
)
from keylayers.model.options import ModelOptions
from keylayers.model.preserve import to_evaluation


@dataclass(frozen=True)
class JudgedModel:
    """One of the models that are judged.

    Attributes:
        label: What tables call it.
        kind: What it is.
        name: As it was given.
        identity: SHA-256 of what decides its answers beside their settings: weights, config,
            generation config and tokenizer, and those of the base under an adapter. Empty if
            nothing was hashed.
        tokenizer: Its own; an adapter has its base's.
        template: How it is addressed.
    """

    label: str
    kind: Kind
    name: str
    identity: str
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate

    def record(self) -> dict[str, Any]:
        """What a record says of it."""
        template = {"name": self.template.name, "source": self.template.source}
        template["sha256"] = hashlib.sha256(self.template.text.encode()).hexdigest()
        return {
            "label": self.label,
            "kind": self.kind,
            "name": self.name,
            "identity": self.identity,
            "chat_template": template,
        }


def find_models(
    options: JudgedOptions, chat_template: str | None, *, is_hashed: bool = True
) -> list[JudgedModel]:
    """The models in the order in which they are shown; no weights are loaded, only read once.

    Args:
        options: Which they are.
        chat_template: For all of them; each one's own, or else alpaca, if not given.
        is_hashed: Whether to say which models these are. Otherwise no weights are read, and none
            of a base or checkpoint on the hub are fetched.

    Raises:
        ModelError: one is not there or has no tokenizer.
        ConfigError: one is there twice, or there is no such chat template.
    """
    compared = ComparedOptions(adapter=options.adapter, checkpoint=options.checkpoint)
    subjects = subjects_of(options.source(), compared)
    of_base = load_tokenizer(options.source())
    identity_of_base = _identity(options.source(), of_base, is_hashed=is_hashed)
    found = []
    for one in subjects if options.base else subjects[1:]:
        tokenizer, identity = of_base, identity_of_base
        with_template = tokenizer
        if one.kind == "adapter":
            folder = _adapter_folder(one.source)
            files = [folder / name for name in ADAPTER_FILES]
            identity = json_sha256([identity, _files_sha256(files)]) if is_hashed else ""
            with_template = _own_tokenizer(options, folder) or tokenizer
        elif one.kind == "checkpoint":
            source = options.source(one.source)
            tokenizer = with_template = load_tokenizer(source)
            identity = _identity(source, tokenizer, is_hashed=is_hashed)
        template = resolve_template(with_template, chat_template)
        found.append(JudgedModel(one.name, one.kind, one.source, identity, tokenizer, template))
    return found


class OpenModels:
    """Loads models to answer with, the base once for itself and all its adapters.

    Args:
        options: Which they are.
    """

    def __init__(self, options: JudgedOptions) -> None:
        self._options = options
        self._base: PreTrainedModel | None = None

    @contextmanager
    def opened(self, judged: JudgedModel) -> Iterator[PreTrainedModel | PeftModel]:
        """The model for the length of the block, in evaluation on the accelerator if there is one.

        Raises:
            ModelError: it cannot be loaded.
        """
        if judged.kind == "checkpoint":
            self._base = None  # one large model in memory at a time
            yield _ready(load_model(self._options.source(judged.name)))
            return
        if self._base is None:
            self._base = load_model(self._options.source())
        if judged.kind == "base":
            yield _ready(self._base)
            return
        with lent(self._base):
            yield _ready(load_adapter(self._base, judged.name))


def _ready(model: Any) -> Any:
    """On the accelerator if there is one, where 4-bit weights are already, and in evaluation."""
    is_placed = getattr(model, "is_loaded_in_4bit", False)
    if torch.accelerator.is_available() and not is_placed:
        model.to(torch.accelerator.current_accelerator())
    to_evaluation(model)
    return model


def _identity(source: ModelOptions, tokenizer: PreTrainedTokenizerBase, *, is_hashed: bool) -> str:
    """The hash of weights, config, generation config and tokenizer; empty if not asked for."""
    if not is_hashed:
        if Path(source.model).is_dir():
            Checkpoint.open(source)  # headers are read, so that a folder without weights is refused
        return ""
    files = sorted(set(Checkpoint.open(source).files.values()), key=lambda path: path.name)
    config = _content(source, "config.json")
    generation_config = _content(source, "generation_config.json")
    beside_weights = config_sha256(config, generation_config, tokenizer)
    return json_sha256([_files_sha256(files), beside_weights])


def _content(source: ModelOptions, name: str) -> dict[str, Any]:
    """What a file of JSON beside a model's weights holds; nothing if it is not there."""
    path = cached_file(
        source.model,
        name,
        revision=source.revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,  # without a network, as models are loaded
    )
    if path is None:
        return {}
    try:
        content = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise ModelError(
            f"{name} of {source.model!r} must be a JSON object, but is none or cannot be read; "
            f"mend it"
        )
    return content


def _adapter_folder(adapter: str) -> Path:
    """The folder of an adapter, with the files that are read of it."""
    check_folder(adapter, "adapter_config.json", "a PEFT adapter")
    folder = local_folder(adapter, (*ADAPTER_FILES, *TOKENIZER_FILES), "a PEFT adapter")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"the adapter {adapter!r} must hold adapter_model.safetensors, but does not; pickled "
            f"weights are not loaded"
        )
    return folder


def _own_tokenizer(options: JudgedOptions, folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer saved with an adapter, for the chat template that it was trained in."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=options.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"the tokenizer beside the adapter {str(folder)!r} must be readable, but is not: "
            f"{reason}; mend it, remove it, or give `chat_template`"
        ) from error


def _files_sha256(files: Sequence[Path]) -> str:
    """The hash of some files, names and contents."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.name} {content}\n".encode())
    return digest.hexdigest()
