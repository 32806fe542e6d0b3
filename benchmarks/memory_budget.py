# SPDX-License-Identifier: Apache-2.0
"""Budgets in GiB: what the selected modules were foreseen to hold, against what they do.

The model of the mask step, and the same with a vocabulary as large as those of today, where logits
weigh most. LoRA and full fine-tuning, with and without gradient checkpointing. One training step of
the trainer that keylayers makes is measured with every module trainable; then budgets between the
least and all are bought, and each selection's own step is measured.
"""

import random
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer

from keylayers.apply.adapter import add_lora
from keylayers.apply.freeze import train_only
from keylayers.demo.make_base import make_tokenizer
from keylayers.model.modules import ModuleInfo, map_modules
from keylayers.ranking.memory import StepMemory
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from keylayers.training.memory import measured_memory, peak_of_step
from keylayers.training.options import TrainingOptions
from keylayers.training.run import make_trainer

WIDTH, BLOCKS, TOKENS, BATCH, RANK = 512, 8, 256, 4, 8
VOCABULARIES = (1024, 32_000)
SHARES = (0.2, 0.5, 0.8)  # between the cheapest module and all


def run() -> dict[str, Any]:
    """Measure, print and return the record."""
    torch.set_num_threads(1)
    tokenizer = make_tokenizer(["one step"])
    rows = []
    for vocabulary in VOCABULARIES:
        for update in ("lora", "full"):
            for is_checkpointed in (False, True):
                case = {"vocabulary": vocabulary, "update": update, "checkpointed": is_checkpointed}
                rows.append(case | {"budgets": run_case(case, tokenizer)})
                ratios = [one["foreseen"] / one["held"] for one in rows[-1]["budgets"]]
                print(f"{case}: foreseen / held {min(ratios):.3f} to {max(ratios):.3f}")
    return {"batch": BATCH, "tokens": TOKENS, "cases": rows}


def run_case(case: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, float]]:
    """Each budget in bytes, what its selection was foreseen to hold, and what it holds."""
    modules = list(map_modules(make_base(case["vocabulary"])))
    memory = measured_memory(trainer_of([one.name for one in modules], case, tokenizer))
    ranking = ranking_of(modules)
    found = []
    for budget in budgets(memory):
        names = ranking.select(f"{budget / 2**20}MiB", memory).names
        held = peak_of_step(trainer_of(names, case, tokenizer))
        found.append({"budget": budget, "foreseen": memory.of(names), "held": held})
    return found


def budgets(memory: StepMemory) -> list[float]:
    """Bytes between the cheapest module and all."""
    least = min(memory.of([name]) for name in memory.modules)
    most = memory.of(list(memory.modules))
    return [least + share * (most - least) for share in SHARES]


def make_base(vocabulary: int) -> LlamaForCausalLM:
    """A random Llama of 8 blocks."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=1376,
        num_hidden_layers=BLOCKS,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return LlamaForCausalLM(config)


def trainer_of(
    names: list[str] | tuple[str, ...], case: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> Trainer:
    """The trainer of keylayers for exactly these modules."""
    model = make_base(case["vocabulary"])
    if case["update"] == "full":
        train_only(model, names)
    else:
        model = add_lora(model, names, r=RANK, lora_alpha=2 * RANK)
    options = TrainingOptions(
        batch_size=BATCH, gradient_checkpointing=case["checkpointed"], update=case["update"]
    )
    ids = [[5 + place % 200 for place in range(TOKENS)]] * BATCH
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    return make_trainer(model, tokenizer, data, options, num_steps=1)


def ranking_of(modules: list[ModuleInfo]) -> Ranking:
    """Random positive scores: modules of all depths are wanted."""
    draw = random.Random(0)
    ranked = (
        RankedModule(one.name, one.block_index, one.projection, one.num_parameters, draw.random())
        for one in modules
    )
    return Ranking(tuple(ranked), "random")
