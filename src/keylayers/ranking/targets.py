# SPDX-License-Identifier: Apache-2.0
"""Targets with which PEFT hits exactly the given modules. Needs no torch.

PEFT shortens lists of 20 names and more when it saves them, and the short form can match more
modules on another model. A grouped regular expression is saved as it is and stays exact. On
mixtures of experts PEFT rewrites targets: an expression hits every block, and the dense
feed-forward of a block becomes the experts of the others. For these models we list attention
modules by name, and everything that PEFT would rewrite by the names of its parameters.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

# Last names of modules that PEFT rewrites in the mixtures of experts that it knows.
REWRITTEN = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def lora_targets(names: Sequence[str], stacked: Collection[str] | None) -> dict[str, Any]:
    """The fields of a PEFT config that put LoRA on exactly `names`, as PEFT takes them."""
    if stacked is None:
        return {"target_modules": target_regex(names)}
    keys = {name: peft_key(name, stacked) for name in names}
    parameters = [key for name, key in keys.items() if name in stacked or key != name]
    modules = [name for name in names if keys[name] not in parameters]
    return {"target_modules": modules, "target_parameters": parameters}


def peft_key(name: str, stacked: Collection[str] | None) -> str:
    """What a module is called in a config: by its parameter where PEFT would rewrite its name."""
    is_rewritten = stacked is not None and name.rpartition(".")[2] in REWRITTEN
    return f"{name}.weight" if is_rewritten and name not in (stacked or ()) else name


def rank_options(
    ranks: Mapping[str, int], scaling: float, stacked: Collection[str] | None = None
) -> dict[str, Any]:
    """The fields of a PEFT config for these ranks by module, with `alpha / rank` equal everywhere.

    `r` is the highest rank, so engines that read `r` and `lora_alpha` alone compute the same.
    """
    highest = max(ranks.values())

    def alpha(rank: int) -> int | float:
        value = scaling * rank
        return int(value) if float(value).is_integer() else value

    lower = {peft_key(name, stacked): rank for name, rank in ranks.items() if rank != highest}
    return {
        "r": highest,
        "lora_alpha": alpha(highest),
        "rank_pattern": lower,
        "alpha_pattern": {name: alpha(rank) for name, rank in lower.items()},
    }


def target_regex(names: Iterable[str]) -> str:
    r"""One regular expression that fully matches `names` and no other module name.

    Names that differ only in their block are grouped:
    `model\.layers\.(?:(?:5|7)\.mlp\.down_proj|...)`.
    """
    by_prefix: dict[str, list[str]] = {}
    for (prefix, suffix), indices in by_block(names).items():
        by_prefix.setdefault(re.escape(prefix), []).append(_any_of(indices) + re.escape(suffix))
    return _any_of([prefix + _any_of(tails) for prefix, tails in by_prefix.items()])


def _any_of(expressions: Sequence[str]) -> str:
    return expressions[0] if len(expressions) == 1 else f"(?:{'|'.join(expressions)})"


def by_block(names: Iterable[str]) -> dict[tuple[str, str], list[str]]:
    """(prefix, suffix) of names that differ only in their block -> block numbers, as text.

    A name without a number is a prefix with an empty suffix and an empty number.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = re.match(r"(.*?\.)(\d+)(\..*)", name)
        prefix, index, suffix = match.groups() if match else (name, "", "")
        groups.setdefault((prefix, suffix), []).append(index)
    return groups
