# SPDX-License-Identifier: Apache-2.0
"""Folders and hub repositories of models and adapters, and the tensors in them.

Only safetensors are read, never pickle.
"""

import copy
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils.hub import cached_file

from keylayers.errors import ModelError
from keylayers.model.options import ModelOptions

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CONFIG_FILES = ("config.json", "generation_config.json", "*.py")  # next to the weights
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.model", "chat_template*", "additional_chat_templates/*"),
)
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
# What a folder without the files, a bad name or the hub raise; JSONDecodeError is a ValueError.
NOT_FOUND = (OSError, ValueError, SafetensorError, HfHubHTTPError)


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a safetensors checkpoint by name, each read from disk when it is asked for."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files  # the file that holds each tensor

    @staticmethod
    def open(source: ModelOptions) -> "Checkpoint":
        """The checkpoint at `source`; only its headers are read."""
        check_folder(source.model, "config.json", "a model")
        files: dict[str, Path] = {}
        with required(f"{source.model!r} must hold its weights as safetensors"):
            for path in _safetensors_files(source):
                with safe_open(path, framework="pt") as file:
                    files |= dict.fromkeys(file.keys(), path)
        return Checkpoint(files)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], framework="pt") as file:
            return file.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.files  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def named_as_in(self, model: PreTrainedModel) -> "LoadedNames":
        """The tensors by the names of the model's parameters."""
        return LoadedNames(self, model)

    def dtype(self) -> torch.dtype:
        """The dtype of most weights on disk."""
        counts: Counter[torch.dtype] = Counter()
        for path in dict.fromkeys(self.files.values()):
            with safe_open(path, framework="pt") as file:
                stored = [file.get_slice(name).get_dtype() for name in file.keys()]  # noqa: SIM118 - not a mapping
            counts.update(STORED_DTYPES.get(dtype, torch.float32) for dtype in stored)
        return counts.most_common(1)[0][0]


class LoadedNames(Mapping[str, Tensor]):
    """A checkpoint's tensors by the names of a model's parameters, read when they are asked for.

    transformers renames and joins tensors while it loads them: experts that are stored one by one
    become one parameter. This does the same for a single parameter, with transformers' own rules.

    Attributes:
        stored: Parameter -> the checkpoint's names of the tensors that it is made of.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        # As `convert_and_load_state_dict_in_model` of transformers 5.23, up to what it collects.
        self._checkpoint, self._model = checkpoint, model
        transforms = get_model_conversion_mapping(model)
        renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        converters = [each for each in transforms if isinstance(each, WeightConverter)]
        of_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        known, prefix = model.state_dict(), model.base_model_prefix
        self._converted: dict[str, tuple[str, WeightConverter]] = {}  # its first name
        self._patterns: dict[str, str] = {}
        self.stored: dict[str, list[str]] = {}
        for stored in sorted(checkpoint, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, known)
            if name not in known and stored in known:
                name, pattern = rename_source_key(stored, [], [], prefix, known)
            names = [name]
            if pattern is not None:
                converter = of_pattern[pattern]
                first, *others = converter.target_patterns
                names += [name.replace(first, other) for other in others]
                self._converted |= dict.fromkeys(names, (name, converter))
                self._patterns[stored] = pattern
            for own in names:
                self.stored.setdefault(own, []).append(stored)

    def __getitem__(self, name: str) -> Tensor:
        stored = self.stored[name]
        if name not in self._converted:
            return self._checkpoint[stored[0]]  # of several, transformers takes the first
        first, converter = self._converted[name]
        converter = copy.deepcopy(converter)
        for own in stored:
            converter.add_tensor(first, own, self._patterns[own], self._checkpoint[own])
        found: Tensor | list[Tensor]
        found = converter.convert(first, model=self._model, config=self._model.config)[name]
        return found[0] if isinstance(found, list) else found

    def __contains__(self, name: object) -> bool:
        return name in self.stored  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def _safetensors_files(source: ModelOptions) -> list[Path]:
    """The weight files of a checkpoint, whole or sharded, fetched from the hub where needed."""
    find = partial(cached_file, source.model, revision=source.revision)
    index = find("model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index is None:
        return [Path(find("model.safetensors"))]
    shards = json.loads(Path(index).read_text())["weight_map"].values()
    return [Path(find(shard)) for shard in dict.fromkeys(shards)]


def local_folder(name: str, patterns: Sequence[str], kind: str) -> Path:
    """The folder `name`, or a copy of the files of the hub repository that match `patterns`."""
    if Path(name).is_dir():
        return Path(name)
    with required(f"{name!r} must be {kind}"):
        return Path(snapshot_download(name, allow_patterns=list(patterns)))


def check_folder(name: str, wanted: str, kind: str) -> None:
    """Refuse a path that does not exist, or a folder that lacks the file `wanted`."""
    path = Path(name)
    if path.is_dir():
        if not (path / wanted).is_file():
            raise ModelError(f"{name!r} must be {kind}, but the folder holds no {wanted}")
    elif path.exists():
        raise ModelError(
            f"{name!r} must be {kind}: a folder or a name on the hub, but it is a file"
        )
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise ModelError(f"{name!r} must be {kind}, but there is no such folder")


@contextmanager
def required(must: str, errors: tuple[type[Exception], ...] = NOT_FOUND) -> Iterator[None]:
    """Turn the errors of libraries into one that says what must hold."""
    try:
        yield
    except errors as error:
        raise ModelError(f"{must}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    """The first line of a library's message, or that the hub cannot be reached."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LocalEntryNotFoundError):
            return "there is no such folder, and the hub cannot be reached to look for it there"
        cause = cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # torch's heading over the tensors that differ
        return lines[1]
    return lines[0] if lines else type(error).__name__
