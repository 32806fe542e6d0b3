# SPDX-License-Identifier: Apache-2.0
"""A tuned checkpoint on disk with the base's weights in the modules that were not selected.

The tuned checkpoint is copied file by file, then the base's values are written over those of these
modules, one tensor at a time. So shards, dtypes and all other tensors stay as they are, and no more
than one tensor is in memory.
"""

import json
import shutil
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from keylayers.apply.saving import bits_of, has_same_bits
from keylayers.errors import GuardError, ModelError

INDEX = "model.safetensors.index.json"


def restore_modules(
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
    index = next(iter(files.values())).with_name(INDEX)
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
            file.write(bits_of(value.to(dtype)).numpy().data)


def prove_restored(
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
        if not has_same_bits(written[name], source):
            odd.append(name)
    if odd:
        raise GuardError(
            f"the pruned checkpoint must be the tuned one but for the pruned modules, but "
            f"{len(odd)} tensors differ, first {odd[0]}"
        )
