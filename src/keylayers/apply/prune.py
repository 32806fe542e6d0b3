# SPDX-License-Identifier: Apache-2.0
"""Adapters and checkpoints on disk without the modules that were not selected.

Files in, files out: a module that is kept whole keeps the original's bits, never numbers that went
through a model. Rank-one parts are computed in float64 and rounded once.
"""

import json
import math
import re
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from keylayers.errors import GuardError, ModelError
from keylayers.model.checkpoint import (
    ADAPTER_FILES,
    CONFIG_FILES,
    TOKENIZER_FILES,
    Checkpoint,
    local_folder,
)
from keylayers.model.modules import base_model_of, map_modules
from keylayers.model.options import ModelOptions
from keylayers.ranking.selection import Selection
from keylayers.ranking.targets import lora_targets, rank_options
from keylayers.updates import AdapterUpdate, adapter_updates
from keylayers.updates.adapter import tuner_layers
from keylayers.updates.checkpoints import value_like

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NESTED = ".base_layer"  # what PEFT adds to the path of a layer in another layer
SAVE_AGAIN = "save both with save_pretrained(folder, save_original_format=False), and prune these"
PREFIX = "base_model.model."  # PEFT's, before the names of the base model


def prune_adapter(
    adapter: str,
    folder: Path,
    model: PeftModel,
    pruned: Collection[str],
    cut: Selection | None = None,
) -> Path:
    """Write the adapter without the modules `pruned`; the folder that it was read from.

    With `cut`, a selection of rank-one parts, the other modules keep these parts alone, in a LoRA
    (or DoRA) adapter with a rank for each module and a scaling of 1.
    """
    source = local_folder(adapter, (*ADAPTER_FILES, *TOKENIZER_FILES), "a PEFT adapter")
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    base = {id(layer): path for path, layer in base_model_of(model).named_modules()}
    paths = {name: base[id(layer)] for name, layer in tuner_layers(model).items()}
    with safe_open(source / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
        names = kept_tensors(list(file.keys()), paths, pruned)
        tensors = {new: file.get_tensor(old) for old, new in names.items()}
    kept = [name for name in paths if name not in pruned]
    stacked = {info.name for info in map_modules(model, "all") if info.is_stacked} or None
    config = pruned_config(config, kept, stacked)
    if cut is not None and cut.parts is not None and cut.ranks is not None:
        new_paths = _paths_without(paths, pruned)
        tensors = _cut_tensors(tensors, adapter_updates(model), new_paths, cut.parts)
        config = _cut_config(config, rank_options(cut.ranks, 1.0, stacked))
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    _copy_files(source, folder, TOKENIZER_FILES)
    _prove_same_bits(load_file(folder / WEIGHTS), tensors, tensors.__getitem__)
    return source


def _cut_tensors(
    tensors: Mapping[str, Tensor],
    updates: Sequence[AdapterUpdate],
    paths: Mapping[str, str],
    parts: Mapping[str, Sequence[int]],
) -> dict[str, Tensor]:
    """The tensors of a file with the kept parts alone in the place of the kept modules' own."""
    owner = _owners(tensors, paths)
    cut = {name: tensor for name, tensor in tensors.items() if owner[name] is None}
    dtypes = {owner[name]: tensor.dtype for name, tensor in tensors.items()}
    for update in updates:
        name = update.module.name
        if name in parts:
            for key, value in update.cut(parts[name]).items():
                value = value.to("cpu", dtypes[name]).contiguous()
                cut[f"{PREFIX}{paths[name]}.{key}"] = value
    return cut


def _cut_config(config: Mapping[str, Any], ranks: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the parts: that of the adapter, as plain LoRA (or DoRA) with these ranks."""
    known = {option.name for option in fields(LoraConfig)}  # fewer than AdaLoRA's
    own = {key: value for key, value in config.items() if key in known}
    plain = {"peft_type": "LORA", "use_rslora": False, "init_lora_weights": True}
    return own | plain | dict(ranks)


def prune_checkpoint(
    model: PreTrainedModel, tuned: str, base: ModelOptions, folder: Path, pruned: Sequence[str]
) -> tuple[Checkpoint, list[str]]:
    """Write the tuned checkpoint to `folder` with the base's weights in the modules `pruned`.

    `model` has their architecture; it says under which names weights are stored. Shards, dtypes
    and all other tensors stay as they are, and one tensor at a time is in memory. Returns the tuned
    checkpoint, and the names of the tensors that have the base's values now.
    """
    patterns = (*CONFIG_FILES, *TOKENIZER_FILES, "model.safetensors.index.json")
    _copy_files(local_folder(tuned, patterns, "a model"), folder, patterns)
    old, source = Checkpoint.open(ModelOptions(model=tuned)), Checkpoint.open(base)
    files = old.files
    restored = names_in_base(old, source, model, pruned)

    def expected(name: str) -> Tensor:
        value = old[name]
        return value_like(source, restored[name], value, "the base") if name in restored else value

    for path in dict.fromkeys(files.values()):
        copy = folder / path.name
        shutil.copyfile(path, copy)
        _overwrite(copy, ((name, expected(name)) for name in restored if files[name] == path))
    written = Checkpoint.open(ModelOptions(model=str(folder)))
    _prove_same_bits(written, files, expected)
    return old, list(restored)


def names_in_base(
    tuned: Checkpoint, base: Checkpoint, model: PreTrainedModel, modules: Sequence[str]
) -> dict[str, str]:
    """The stored tensors of the modules' weights in `tuned` -> the same ones in `base`."""
    parts = dict.fromkeys(f"{name}{end}" for name in modules for end in ("", ".weight", ".bias"))
    mine, theirs = (checkpoint.named_as_in(model).stored for checkpoint in (tuned, base))
    found: dict[str, str] = {}
    for part in (part for part in parts if part in mine):
        others = theirs.get(part, mine[part])
        if len(others) != len(mine[part]):
            raise ModelError(
                f"the two checkpoints must be stored alike, but {part} is in {len(mine[part])} "
                f"tensors of the tuned one and in {len(others)} of the base; {SAVE_AGAIN}"
            )
        found |= dict(zip(mine[part], others, strict=True))
    for name, own in mine.items():
        if name not in parts and (shared := found.keys() & own):
            raise ModelError(
                f"a module that is pruned must be stored alone, but {min(shared)} of the tuned "
                f"checkpoint also holds {name}; {SAVE_AGAIN}"
            )
    return found


def _overwrite(path: Path, values: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors of the same dtypes and shapes over those in a safetensors file."""
    with path.open("r+b") as file:
        header, start = _header(file)
        for name, value in values:
            file.seek(start + header[name]["data_offsets"][0])
            file.write(_bits(value).numpy().data)


def _header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file by tensor, and where the values start."""
    # Eight bytes with the length of a JSON header, the header with places behind it, the values.
    (length,) = struct.unpack("<Q", file.read(8))
    return json.loads(file.read(length)), 8 + length


def _prove_same_bits(
    written: Mapping[str, Tensor], names: Collection[str], expected: Callable[[str], Tensor]
) -> None:
    """Raise a GuardError unless `written` holds exactly `names`, each with the expected bits."""

    def is_same(own: Tensor, other: Tensor) -> bool:  # NaN equals itself here
        is_alike = own.dtype == other.dtype and own.shape == other.shape
        return is_alike and torch.equal(_bits(own), _bits(other))

    odd = sorted(written.keys() ^ set(names)) or [
        name for name in names if not is_same(written[name], expected(name))
    ]
    if odd:
        raise GuardError(
            f"a pruned update must hold the kept weights as they were, but {len(odd)} tensors "
            f"differ, first {odd[0]}"
        )


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes in row-major order."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def num_parameters(path: Path) -> int:
    """How many numbers a safetensors file holds; only its header is read."""
    with safe_open(path, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def bytes_on_disk(adapter: str) -> tuple[float, int]:
    """What a number of LoRA takes on disk, and what everything else in the adapter's file takes."""
    path = local_folder(adapter, ADAPTER_FILES, "a PEFT adapter") / WEIGHTS
    with path.open("rb") as file:
        header, _ = _header(file)
    own = [tensor for name, tensor in header.items() if ".lora_" in name]
    num_bytes = sum(end - start for start, end in (tensor["data_offsets"] for tensor in own))
    each = num_bytes / sum(math.prod(tensor["shape"]) for tensor in own)
    return each, path.stat().st_size - num_bytes


def _copy_files(source: Path, folder: Path, patterns: Sequence[str]) -> None:
    """Copy those files of `source` that match `patterns` to the same places in `folder`."""
    for path in dict.fromkeys(path for pattern in patterns for path in source.glob(pattern)):
        if path.is_file():
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def pruned_config(
    config: Mapping[str, Any], kept: Sequence[str], stacked: Collection[str] | None = None
) -> dict[str, Any]:
    """An adapter's config for exactly the modules `kept`; everything else is as it was."""
    changed = dict(config) | lora_targets(kept, stacked)
    for key in ("layers_to_transform", "layers_pattern"):  # PEFT refuses them with an expression
        if key in changed:
            changed[key] = None
    for key in ("rank_pattern", "alpha_pattern"):
        if changed.get(key):
            changed[key] = {
                pattern: value
                for pattern, value in changed[key].items()
                if any(_concerns(pattern, name) for name in kept)
            }
    return changed


def _concerns(pattern: str, name: str) -> bool:
    """Whether an entry of a rank or alpha pattern is for the module, by PEFT's own rule."""
    # AdaLoRA names a parameter of the module instead.
    is_of_parameter = pattern.removeprefix(PREFIX).startswith(f"{name}.")
    return is_of_parameter or re.match(rf"(.*\.)?({pattern})$", name) is not None


def kept_tensors(
    names: Sequence[str], paths: Mapping[str, str], pruned: Collection[str]
) -> dict[str, str]:
    """Tensors of an adapter file to keep, all but those of the modules `pruned` -> their new names.

    `paths` are those of the PEFT layers by module. PEFT nests the layers of several parameters of
    one module, so a name changes when an outer layer goes.
    """
    owner = _owners(names, paths)
    bare = [module for module in paths if module not in owner.values()]
    if bare:
        raise ModelError(
            f"the adapter's weights must have the names of the model's modules, but {bare[0]} has "
            f"none; load the adapter with PEFT, save it again, and prune that"
        )
    new_paths = _paths_without(paths, pruned)
    kept = {}
    for name, module in owner.items():
        if module is None:
            kept[name] = name
        elif module in new_paths:
            kept[name] = name.replace(f"{paths[module]}.", f"{new_paths[module]}.", 1)
    return kept


def _owners(names: Iterable[str], paths: Mapping[str, str]) -> dict[str, str | None]:
    """Tensor -> the module that it belongs to, or None; an inner layer's is not its outer one's."""
    innermost = sorted(paths, key=lambda module: -len(paths[module]))
    return {
        name: next((own for own in innermost if name.startswith(f"{PREFIX}{paths[own]}.")), None)
        for name in names
    }


def _paths_without(paths: Mapping[str, str], pruned: Collection[str]) -> dict[str, str]:
    """Module -> path of its layer once the layers of the modules `pruned` are not there."""
    depths: Counter[str] = Counter()
    found = {}
    for module in sorted(paths, key=lambda module: len(paths[module])):  # the outermost first
        if module not in pruned:
            place = paths[module].replace(NESTED, "")
            found[module] = place + NESTED * depths[place]
            depths[place] += 1
    return found
