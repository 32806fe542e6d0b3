# SPDX-License-Identifier: Apache-2.0
"""A smaller update on disk: of an adapter or of a tuned checkpoint only the selected modules.

Files in, files out: what is kept is the original's bits, never numbers that went through a model.
A checkpoint is copied file by file, then the base's values are written over those of the modules
that are not kept, one tensor at a time, so that its shards, dtypes and other tensors stay as they
are.
"""

import json
import math
import re
import shutil
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from keylayers.apply.adapter import target_regex
from keylayers.errors import GuardError, ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # PEFT's, before the names of the base model
# With these PEFT changes the base weights when it loads an adapter.
CHANGES_BASE = ("pissa", "corda", "olora", "loftq")


def prune_adapter(
    source: Path, folder: Path, *, kept: Sequence[str], pruned: Collection[str]
) -> None:
    """Write the adapter in `source` to `folder` without the modules `pruned`.

    Args:
        source: Folder of a PEFT adapter; unchanged.
        folder: An existing folder for the config and the weights.
        kept: Full names, in the base model, of all other modules that the adapter updates, those
            outside the blocks too.
        pruned: Full names of the modules to leave out.

    Raises:
        ModelError: an adapter whose modules cannot be taken out one by one, or without weights of
            its own for one that is kept.
    """
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    _check_separable(config)
    tensors, metadata = {}, None
    with safe_open(source / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
        names = kept_tensors(list(file.keys()), kept, pruned)
        for name in names:
            tensors[name] = file.get_tensor(name)
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    text = json.dumps(pruned_config(config, kept), indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    _prove_same_bits(source / WEIGHTS, folder / WEIGHTS, names)


def pruned_config(config: Mapping[str, Any], kept: Sequence[str]) -> dict[str, Any]:
    """An adapter's config for exactly the modules `kept`; everything else is as it was."""
    changed = dict(config) | {"target_modules": target_regex(kept)}
    for key in ("layers_to_transform", "layers_pattern"):  # PEFT takes none beside an expression
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


def kept_tensors(
    names: Sequence[str], kept: Sequence[str], pruned: Collection[str]
) -> tuple[str, ...]:
    """The tensors of an adapter file that stay: all but those of the modules `pruned`.

    Raises:
        ModelError: a module has no tensor, so that the file uses other names than the model.
    """
    owner = {
        name: next(
            (module for module in (*kept, *pruned) if name.startswith(f"{PREFIX}{module}.")), None
        )
        for name in names
    }
    bare = [module for module in (*kept, *pruned) if module not in owner.values()]
    if bare:
        raise ModelError(
            f"the adapter's weights must have the names of the model's modules, but {bare[0]} has "
            f"none; load the adapter with PEFT, save it again, and prune that"
        )
    gone = set(pruned)
    return tuple(name for name in names if owner[name] not in gone)


def num_parameters(path: Path) -> int:
    """How many numbers a safetensors file holds; only its header is read."""
    with safe_open(path, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _check_separable(config: Mapping[str, Any]) -> None:
    """Refuse what an adapter holds beside its modules, and what it does to the base's weights."""
    reason = None
    start = config.get("init_lora_weights")
    if config.get("target_parameters"):
        reason = "has `target_parameters`, which are no modules"
    elif config.get("bias", "none") != "none":
        reason = f"also trained biases of the base (`bias` {config['bias']!r})"
    elif isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        reason = (
            f"changes the base weights when it is loaded (`init_lora_weights` {start!r}; PEFT's "
            f"`path_initial_model_for_weight_conversion` saves one that does not)"
        )
    if reason is not None:
        raise ModelError(f"the modules of an adapter must stand alone, but this one {reason}")


def _concerns(pattern: str, name: str) -> bool:
    """Whether an entry of a rank or alpha pattern is for the module, by PEFT's own rule.

    AdaLoRA names a parameter of the module instead.
    """
    is_of_parameter = pattern.removeprefix(PREFIX).startswith(f"{name}.")
    return is_of_parameter or re.match(rf"(.*\.)?({pattern})$", name) is not None


def prune_checkpoint(
    files: Mapping[str, Path], base: Mapping[str, Tensor], folder: Path, *, restored: Sequence[str]
) -> None:
    """Write a checkpoint to `folder`, with the base's values in the tensors `restored`.

    Args:
        files: Tensor name -> the safetensors file of the tuned checkpoint that holds it; unchanged.
        base: The base checkpoint by tensor name.
        folder: An existing folder; the files keep their names, an index is copied too.
        restored: Tensors that take the base's values, rounded to the dtype that the tuned
            checkpoint stores.

    Raises:
        ModelError: the base has no such tensor, or of another shape.
    """
    for path in dict.fromkeys(files.values()):
        shutil.copyfile(path, folder / path.name)
        _overwrite(folder / path.name, base, [name for name in restored if files[name] == path])
    index = next(iter(files.values())).with_name("model.safetensors.index.json")
    if index.is_file():
        shutil.copyfile(index, folder / index.name)


def _overwrite(path: Path, values: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """Write `values` over the tensors `names` of a safetensors file, in place.

    The format: eight bytes with the length of a JSON header, the header with each tensor's place
    behind it, the values in row-major order.
    """
    with safe_open(path, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in names}  # mapped, not read
    kinds = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    del tensors
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        for name in names:
            if name not in values:
                raise ModelError(
                    f"the base checkpoint must hold every module of the tuned one, but lacks {name}"
                )
            value = values[name]
            dtype, shape = kinds[name]
            if value.shape != shape:
                raise ModelError(
                    f"the two checkpoints must have the same shapes, but {name} is "
                    f"{tuple(value.shape)} in the base and {tuple(shape)} in the tuned one"
                )
            file.seek(8 + length + header[name]["data_offsets"][0])
            file.write(_bits(value.to(dtype)).numpy().data)


def prove_pruned_checkpoint(
    written: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    restored: Collection[str],
) -> None:
    """Refuse a checkpoint that is not the tuned one with the base's values in exactly `restored`.

    Raises:
        GuardError: a tensor is missing or left over, or its bits come from elsewhere.
    """
    odd = sorted(written.keys() ^ tuned.keys())
    for name in tuned if not odd else ():
        source = base[name].to(tuned[name].dtype) if name in restored else tuned[name]
        if not _is_same(written[name], source):
            odd.append(name)
    if odd:
        raise GuardError(
            f"the pruned checkpoint must be the tuned one but for the pruned modules, but "
            f"{len(odd)} tensors differ, first {odd[0]}"
        )


def _prove_same_bits(source: Path, written: Path, names: Sequence[str]) -> None:
    """Refuse an adapter file that does not hold exactly the tensors `names` of its source."""
    with safe_open(source, framework="pt") as old, safe_open(written, framework="pt") as new:
        odd = sorted(set(new.keys()) ^ set(names))
        for name in names if not odd else ():
            if not _is_same(new.get_tensor(name), old.get_tensor(name)):
                odd.append(name)
    if odd:
        raise GuardError(
            f"the pruned adapter must hold the kept weights as they were, but {len(odd)} differ, "
            f"first {odd[0]}"
        )


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits; NaN equals itself here."""
    is_alike = one.dtype == other.dtype and one.shape == other.shape
    return is_alike and torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
