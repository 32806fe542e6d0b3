# SPDX-License-Identifier: Apache-2.0
"""A training step of a selection against PEFT `all-linear`: time, memory, optimiser state.

And against what keylayers counts: multiply-adds of forward through all, and of backward down to the
lowest trained module. Selections are the upper blocks, and modules spread over all blocks as a
ranking may choose them. With gradient checkpointing as TRL sets it up, and with our callback. At
four sizes; all cases at the second. Peak memory is that of all tensors: weights, what is trained
with gradient and AdamW's moments, and the most that a step holds beside them.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.mask_step import kept_storage
from keylayers.apply.adapter import add_lora
from keylayers.model.modules import ModuleInfo, map_modules
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from keylayers.training.peak import peak_bytes
from keylayers.training.shallow import shallow_backward

BATCH, VOCABULARY = 4, 1024
FRACTIONS = (0.1, 0.2, 0.3, 0.75)
RANK = 8


@dataclass(frozen=True)
class Size:
    """A random Llama and the batches that it is trained on."""

    width: int
    num_blocks: int
    num_tokens: int
    num_rounds: int


SIZES = {
    "2 M": Size(144, 8, 256, 8),
    "26 M": Size(512, 8, 256, 6),
    "113 M": Size(768, 16, 128, 4),
    "484 M": Size(1344, 22, 64, 3),
}
WHOLE = "26 M"
ALL = "all modules (PEFT all-linear)"
SHOWN = (ALL, "10%, the uppermost", "30%, the uppermost", "30%, spread")


@dataclass(frozen=True)
class Case:
    """What is trained, and how.

    Attributes:
        title: For the table.
        names: Modules with LoRA; None for PEFT's `all-linear`.
        is_checkpointed: With gradient checkpointing and gradients of inputs, as TRL has it.
        is_shallow: With keylayers' callback.
    """

    title: str
    names: tuple[str, ...] | None
    is_checkpointed: bool = False
    is_shallow: bool = True


def make_base(size: Size) -> LlamaForCausalLM:
    """A random Llama of that size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=size.width * 43 // 16,
        num_hidden_layers=size.num_blocks,
        num_attention_heads=size.width // 64,
        num_key_value_heads=size.width // 64,
    )
    return LlamaForCausalLM(config)


def cases(modules: list[ModuleInfo]) -> list[Case]:
    """Everything that is measured; the reference first."""
    names = [one.name for one in modules]
    generator = torch.Generator().manual_seed(0)
    order = [names[index] for index in torch.randperm(len(names), generator=generator)]
    found = [Case(ALL, None, is_shallow=False)]
    for fraction in FRACTIONS:
        count = round(fraction * len(names))
        found.append(Case(f"{fraction:.0%}, the uppermost", tuple(names[-count:])))
        found.append(Case(f"{fraction:.0%}, spread", tuple(order[:count])))
    count = round(0.3 * len(names))
    upper = tuple(names[-count:])
    found.append(Case("all modules, checkpointed", None, is_checkpointed=True, is_shallow=False))
    for title, is_shallow in (("as TRL has it", False), ("keylayers", True)):
        found.append(
            Case(f"30%, the uppermost, checkpointed, {title}", upper, True, is_shallow=is_shallow)
        )
    return found


def prepared(case: Case, size: Size) -> PeftModel:
    """The model of a case, ready for a step."""
    base = make_base(size)
    if case.names is None:
        config = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear")
        model = get_peft_model(base, config)
    else:
        model = add_lora(base, case.names, r=RANK, lora_alpha=16)
    model.train()
    if case.is_checkpointed:
        model.enable_input_require_grads()
        base.activation_checkpointing_enable()
    return model


@contextmanager
def as_trained(model: PeftModel, case: Case) -> Iterator[None]:
    """With keylayers' hook where the case has it."""
    handle = shallow_backward(model) if case.is_shallow else None
    yield
    if handle is not None:
        handle.remove()


def counted(case: Case, modules: list[ModuleInfo], size: Size) -> float:
    """Multiply-adds of a step without checkpointing, as a share of those of training all."""
    names = case.names or [one.name for one in modules]
    made_by = {
        "options": {"lora_rank": RANK},
        "model": {"num_head_parameters": size.width * VOCABULARY},
    }
    ranked = (RankedModule(*own(one), score=1.0) for one in modules)
    return Ranking(tuple(ranked), "counted", provenance=made_by).step_time.share(names)


def own(module: ModuleInfo) -> tuple[str, int | None, str, int]:
    """Name, block, projection and size."""
    return module.name, module.block_index, module.projection, module.num_parameters


def run() -> dict[str, Any]:
    """Alternate the cases of each size, print ratios to the reference and return the record."""
    torch.set_num_threads(1)
    return {"batch": BATCH, "sizes": {title: run_size(title, SIZES[title]) for title in SIZES}}


def run_size(title: str, size: Size) -> dict[str, Any]:
    """One size: all cases, or those that the table of sizes shows."""
    modules = list(map_modules(make_base(size)))
    found = cases(modules)
    if title != WHOLE:
        found = [case for case in found if case.title in SHOWN]
    tokens = torch.randint(0, VOCABULARY, (BATCH, size.num_tokens))
    models = [prepared(case, size) for case in found]
    rows: dict[str, dict[str, Any]] = {}
    for case, model in zip(found, models, strict=True):
        with as_trained(model, case):
            rows[case.title] = memory_of(model, tokens) | {
                "num_modules": len(modules) if case.names is None else len(case.names),
                "seconds": [],
                "counted": counted(case, modules, size),
            }
    for _ in range(size.num_rounds):
        for case, model in zip(found, models, strict=True):
            model.zero_grad()
            with as_trained(model, case):
                start = time.perf_counter()
                step(model, tokens)
                rows[case.title]["seconds"].append(time.perf_counter() - start)
    print(f"{title} parameters, {BATCH} x {size.num_tokens} tokens")
    _add_ratios(rows, found)
    return {"tokens": size.num_tokens, "rounds": size.num_rounds, "cases": rows}


def memory_of(model: PeftModel, tokens: Tensor) -> dict[str, float]:
    """What a step keeps for backward, what the optimiser holds, and all tensors at the peak."""
    trained = sum(one.nbytes for one in model.parameters() if one.requires_grad)
    kept = kept_storage(model, lambda: step(model, tokens))
    model.zero_grad()
    taken = peak_bytes(model.device, lambda: step(model, tokens))
    weights = sum(one.nbytes for one in model.parameters())
    return {
        "kept_mib": kept / 2**20,
        "optimizer_mib": 2 * trained / 2**20,  # AdamW holds two numbers for each that is trained
        "peak_mib": (weights + 2 * trained + taken) / 2**20,  # gradients are in what is taken
    }


def step(model: PeftModel, tokens: Tensor) -> None:
    """Forward and backward of one batch."""
    model(input_ids=tokens, labels=tokens).loss.backward()


def _add_ratios(rows: dict[str, dict[str, Any]], found: list[Case]) -> None:
    reference = rows[found[0].title]
    for row in rows.values():
        pairs = zip(row["seconds"], reference["seconds"], strict=True)
        ratios = [own / other for own, other in pairs]
        row["time_ratio_median"] = statistics.median(ratios)
        row["time_ratio_quartiles"] = statistics.quantiles(ratios, n=4)[::2]
        row["kept_ratio"] = row["kept_mib"] / reference["kept_mib"]
        row["peak_ratio"] = row["peak_mib"] / reference["peak_mib"]
        row["optimizer_ratio"] = row["optimizer_mib"] / reference["optimizer_mib"]
    for title, row in rows.items():
        low, high = row["time_ratio_quartiles"]
        print(
            f"{title:<52} time x {row['time_ratio_median']:.2f} ({low:.2f} to {high:.2f}), counted "
            f"x {row['counted']:.2f}, kept x {row['kept_ratio']:.2f}, optimiser x "
            f"{row['optimizer_ratio']:.2f}, peak x {row['peak_ratio']:.2f}"
        )
