# SPDX-License-Identifier: Apache-2.0
"""What all benchmarks share: random Llamas, sides measured in turn, memory kept for backward."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel


def random_llama(width: int, blocks: int, vocabulary: int, **config: Any) -> LlamaForCausalLM:
    """A Llama with random weights, always the same; `config` goes to `LlamaConfig`."""
    torch.manual_seed(0)
    heads = config.pop("num_attention_heads", max(2, width // 64))
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": width * 43 // 16,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocabulary,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | config)))


def selected(names: Sequence[str], fraction: float, place: str) -> list[str]:
    """A share of the modules: the uppermost, or spread over all blocks as a ranking may choose."""
    count = round(fraction * len(names))
    if place == "upper":
        return list(names[-count:])
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    return [names[index] for index in order[:count]]


def with_lora(model: PreTrainedModel) -> PeftModel:
    """LoRA r = 8 on all linear layers, as PEFT's `all-linear` sets it up."""
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))


def in_turn(sides: Mapping[str, Callable[[], object]], num_rounds: int) -> dict[str, list[float]]:
    """Seconds of every side in every round; sides alternate, so that noise hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(num_rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(own: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of the ratio to a reference, round by round."""
    ratios = [a / b for a, b in zip(own, reference, strict=True)]
    return {
        "time_ratio_median": statistics.median(ratios),
        "time_ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def shown(row: Mapping[str, Any], digits: int = 2) -> str:
    """A ratio as text."""
    low, high = (f"{quartile:.{digits}f}" for quartile in row["time_ratio_quartiles"])
    return f"{row['time_ratio_median']:.{digits}f} ({low} to {high})"


def kept_storage(model: torch.nn.Module, one_step: Callable[[], object]) -> int:
    """Bytes of distinct storage that a step keeps for its backward pass, parameters excluded."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        one_step()
    return sum(kept.values())


def last_line_of(*words: str) -> str:
    """The last line that a Python process of its own prints."""
    command = [sys.executable, "-W", "ignore", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return (done.stdout.splitlines() or [""])[-1]
