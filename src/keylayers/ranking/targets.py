# SPDX-License-Identifier: Apache-2.0
"""Targets with which PEFT hits exactly the given modules. Needs no torch.

PEFT shortens lists of 20 names and more when it saves them, and the short form can match more
modules on another model. A grouped regular expression is saved as it is and stays exact. On
mixtures of experts PEFT rewrites targets: an expression hits every block, and the dense
feed-forward of a block becomes the experts of the others. For these models we list attention
modules by name, and everything that PEFT would rewrite by the names of its parameters.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

REWRITTEN = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""Last names of modules that PEFT rewrites in the mixtures of experts that it knows."""


def lora_targets(names: Sequence[str], stacked: Collection[str] | None) -> dict[str, Any]:
    """The fields of a PEFT config that put LoRA on exactly `names`, as PEFT takes them."""
    if stacked is None:
        return {"target_modules": target_regex(names)}
    modules, parameters = [], []
    for name in names:
        if name in stacked:
            parameters.append(name)
        elif name.rpartition(".")[2] in REWRITTEN:
            parameters.append(f"{name}.weight")
        else:
            modules.append(name)
    return {"target_modules": modules, "target_parameters": parameters}


def target_regex(names: Iterable[str]) -> str:
    r"""One regular expression that fully matches `names` and no other module name.

    Names that differ only in their block are grouped:
    `model\.layers\.(?:(?:5|7)\.mlp\.down_proj|...)`.
    """
    by_prefix: dict[str, list[str]] = {}
    for (prefix, suffix), indices in by_block(names).items():
        numbers = indices[0] if len(indices) == 1 else f"(?:{'|'.join(indices)})"
        by_prefix.setdefault(re.escape(prefix), []).append(numbers + re.escape(suffix))
    parts = [
        prefix + (tails[0] if len(tails) == 1 else f"(?:{'|'.join(tails)})")
        for prefix, tails in by_prefix.items()
    ]
    return parts[0] if len(parts) == 1 else f"(?:{'|'.join(parts)})"


def by_block(names: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """(prefix, suffix) of names that differ only in their block -> the block numbers, as text.

    A name without a number is a prefix with an empty suffix and an empty number.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = re.match(r"(.*?\.)(\d+)(\..*)", name)
        prefix, index, suffix = match.groups() if match else (name, "", "")
        groups.setdefault((prefix, suffix), []).append(index)
    return groups
