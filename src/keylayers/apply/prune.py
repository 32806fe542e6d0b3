# SPDX-License-Identifier: Apache-2.0
"""An adapter on disk without the modules that were not selected.

Files in, files out: what is kept is the original's bits, never numbers that went through a model.
"""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from keylayers.apply.saving import has_same_bits
from keylayers.errors import GuardError, ModelError
from keylayers.ranking.targets import lora_targets

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NESTED = ".base_layer"  # what PEFT adds to the path of a layer in another layer
PREFIX = "base_model.model."  # PEFT's, before the names of the base model
# With these PEFT changes the base weights when it loads an adapter.
CHANGES_BASE = ("pissa", "corda", "olora", "loftq")


def prune_adapter(
    source: Path,
    folder: Path,
    *,
    paths: Mapping[str, str],
    pruned: Collection[str],
    stacked: Collection[str] | None = None,
) -> None:
    """Write the adapter in `source` to `folder` without the modules `pruned`.

    Args:
        source: Folder of a PEFT adapter; unchanged.
        folder: An existing folder for the config and the weights.
        paths: Full name of every module that the adapter updates, those outside the blocks too ->
            path of the PEFT layer around it in the base model.
        pruned: Full names of the modules to leave out.
        stacked: The base model's stacked experts; None if it has none.

    Raises:
        ModelError: an adapter whose modules cannot be taken out one by one, or without weights of
            its own for one that is kept.
    """
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    _check_separable(config)
    tensors, metadata = {}, None
    with safe_open(source / WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
        names = kept_tensors(list(file.keys()), paths, pruned)
        for old, new in names.items():
            tensors[new] = file.get_tensor(old)
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    kept = [name for name in paths if name not in pruned]
    own = None if stacked is None else [name for name in kept if name in stacked]
    text = json.dumps(pruned_config(config, kept, own), indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    _prove_same_bits(source / WEIGHTS, folder / WEIGHTS, names)


def pruned_config(
    config: Mapping[str, Any], kept: Sequence[str], stacked: Collection[str] | None = None
) -> dict[str, Any]:
    """An adapter's config for exactly the modules `kept`; everything else is as it was."""
    changed = dict(config) | lora_targets(kept, stacked)
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
    names: Sequence[str], paths: Mapping[str, str], pruned: Collection[str]
) -> dict[str, str]:
    """The tensors of an adapter file that stay, all but those of the modules `pruned` -> new name.

    The name changes where PEFT nests layers, for several parameters of one module: the outer ones
    may go.

    Raises:
        ModelError: a module has no tensor, so that the file uses other names than the model.
    """
    innermost = sorted(paths, key=lambda module: -len(paths[module]))
    owner = {
        name: next((own for own in innermost if name.startswith(f"{PREFIX}{paths[own]}.")), None)
        for name in names
    }
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


def _paths_without(paths: Mapping[str, str], pruned: Collection[str]) -> dict[str, str]:
    """Module -> path of its layer once the layers of the modules `pruned` are not there."""
    outermost_first = sorted(paths, key=lambda module: len(paths[module]))
    depths: dict[str, int] = {}
    found = {}
    for module in outermost_first:
        if module not in pruned:
            place = paths[module].replace(NESTED, "")
            found[module] = place + NESTED * depths.get(place, 0)
            depths[place] = depths.get(place, 0) + 1
    return found


def num_parameters(path: Path) -> int:
    """How many numbers a safetensors file holds; only its header is read."""
    with safe_open(path, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _check_separable(config: Mapping[str, Any]) -> None:
    """Refuse what an adapter holds beside its modules, and what it does to the base's weights."""
    reason = None
    start = config.get("init_lora_weights")
    if config.get("bias", "none") != "none":
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


def _prove_same_bits(source: Path, written: Path, names: Mapping[str, str]) -> None:
    """Refuse a file that does not hold exactly the tensors `names` of its source, renamed."""
    with safe_open(source, framework="pt") as old, safe_open(written, framework="pt") as new:
        odd = sorted(set(new.keys()) ^ set(names.values()))
        for before, after in names.items() if not odd else ():
            if not has_same_bits(new.get_tensor(after), old.get_tensor(before)):
                odd.append(after)
    if odd:
        raise GuardError(
            f"the pruned adapter must hold the kept weights as they were, but {len(odd)} differ, "
            f"first {odd[0]}"
        )
