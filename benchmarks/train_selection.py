# SPDX-License-Identifier: Apache-2.0
"""A training step of a selection against PEFT `all-linear`: time, memory, optimizer state.

Also against what keylayers counts: multiply-adds of a forward pass through everything and a
backward pass down to the lowest trained module. Selections are the uppermost modules, and modules
spread over all blocks as a ranking may choose them; with gradient checkpointing as TRL sets it up,
and with keylayers' callback. Peak memory is that of all tensors: weights, trained parameters with
gradients and AdamW's moments, and the most that a step holds in addition.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from benchmarks.sides import in_turn, kept_storage, random_llama, ratio, selected, shown, with_lora
from keylayers.apply.trainable import add_lora
from keylayers.model.modules import ModuleInfo, map_modules
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from keylayers.training.memory import peak_bytes
from keylayers.training.shallow import shallow_backward

BATCH, VOCABULARY, RANK = 4, 1024, 8
FRACTIONS = (0.1, 0.2, 0.3, 0.75)
# title: width, blocks, tokens, rounds
SIZES = {
    "2 M": (144, 8, 256, 8),
    "26 M": (512, 8, 256, 6),
    "113 M": (768, 16, 128, 4),
    "484 M": (1344, 22, 64, 3),
}
WHOLE = "26 M"  # with all cases
ALL = "all modules (PEFT all-linear)"
SHOWN = (ALL, "10%, the uppermost", "30%, the uppermost", "30%, spread")


@dataclass(frozen=True)
class Case:
    """What is trained, and how."""

    names: list[str] | None  # None: PEFT's `all-linear`
    is_checkpointed: bool = False  # and gradients of inputs, as TRL has it
    is_shallow: bool = True  # with keylayers' callback


def cases(modules: list[ModuleInfo]) -> dict[str, Case]:
    """Title -> case; the reference first."""
    names = [module.name for module in modules]
    found = {ALL: Case(None, is_shallow=False)}
    for fraction in FRACTIONS:
        for place, title in (("upper", "the uppermost"), ("spread", "spread")):
            found[f"{fraction:.0%}, {title}"] = Case(selected(names, fraction, place))
    upper = found["30%, the uppermost"].names
    found["all modules, checkpointed"] = Case(None, True, is_shallow=False)
    for title, is_shallow in (("as TRL has it", False), ("keylayers", True)):
        found[f"30%, the uppermost, checkpointed, {title}"] = Case(upper, True, is_shallow)
    return found


def prepared(case: Case, width: int, blocks: int) -> PeftModel:
    """The model of a case, ready for a step."""
    base = random_llama(width, blocks, VOCABULARY)
    if case.names is None:
        model = with_lora(base)
    else:
        model = add_lora(base, case.names, r=RANK, lora_alpha=16)
    model.train()
    if case.is_checkpointed:
        model.enable_input_require_grads()
        base.activation_checkpointing_enable()
    if case.is_shallow:
        shallow_backward(model)
    return model


def counted_share(names: list[str] | None, modules: list[ModuleInfo], width: int) -> float:
    """Multiply-adds of a step without checkpointing, as a share of those of training all."""
    made_by = {"options": {"lora_rank": RANK}, "model": {"num_head_parameters": width * VOCABULARY}}
    ranked = tuple(RankedModule.of(module, 1.0) for module in modules)
    everything = [module.name for module in modules]
    return Ranking(ranked, "counted", provenance=made_by).step_time.share(names or everything)


def memory_of(model: PeftModel, tokens: Tensor) -> dict[str, float]:
    """MiB kept for backward, of AdamW's two moments, and of all tensors at the peak."""
    trained = sum(one.nbytes for one in model.parameters() if one.requires_grad)
    kept = kept_storage(model, lambda: step(model, tokens))
    model.zero_grad()
    taken = peak_bytes(model.device, lambda: step(model, tokens))  # gradients included
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "kept_mib": kept / 2**20,
        "optimizer_mib": 2 * trained / 2**20,
        "peak_mib": (weights + 2 * trained + taken) / 2**20,
    }


def step(model: PeftModel, tokens: Tensor) -> None:
    """Forward and backward of one batch."""
    model(input_ids=tokens, labels=tokens).loss.backward()


def run_size(title: str) -> dict[str, Any]:
    """One size: all cases, or those that the table of sizes shows."""
    width, blocks, num_tokens, num_rounds = SIZES[title]
    modules = list(map_modules(random_llama(width, blocks, VOCABULARY)))
    found = {name: case for name, case in cases(modules).items() if title == WHOLE or name in SHOWN}
    tokens = torch.randint(0, VOCABULARY, (BATCH, num_tokens))
    rows: dict[str, dict[str, Any]] = {}
    sides: dict[str, Callable[[], None]] = {}
    for name, case in found.items():
        model = prepared(case, width, blocks)
        rows[name] = memory_of(model, tokens)
        rows[name]["num_modules"] = len(case.names or modules)
        rows[name]["counted"] = counted_share(case.names, modules, width)
        sides[name] = lambda model=model: (model.zero_grad(), step(model, tokens))  # type: ignore
    seconds = in_turn(sides, num_rounds)
    print(f"{title} parameters, {BATCH} x {num_tokens} tokens")
    for name, row in rows.items():
        row |= {"seconds": seconds[name], **ratio(seconds[name], seconds[ALL])}
        for what in ("kept", "peak", "optimizer"):
            row[f"{what}_ratio"] = row[f"{what}_mib"] / rows[ALL][f"{what}_mib"]
        print(f"{name:<52} time x {shown(row)}, counted x {row['counted']:.2f}, kept x "
              f"{row['kept_ratio']:.2f}, peak x {row['peak_ratio']:.2f}")  # fmt: skip
    return {"tokens": num_tokens, "rounds": num_rounds, "cases": rows}


def run() -> dict[str, Any]:
    """Alternate the cases of each size, print ratios to the reference and return the record."""
    return {"batch": BATCH, "sizes": {title: run_size(title) for title in SIZES}}
