# SPDX-License-Identifier: Apache-2.0
"""A mask step against its limit: time, and memory kept for the backward pass.

The limit is a bare forward and backward pass for activations through the frozen model with its LoRA
updates. Beside it: gates on the output of B (the naive place), and training all LoRA matrices.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from keylayers.gates import gated
from keylayers.updates import adapter_updates
from keylayers.updates.gate import Gate

NUM_ROUNDS = 12
BATCH, TOKENS, VOCABULARY = 4, 256, 1024


def make_model() -> PeftModel:
    """A random Llama of 26 M parameters with LoRA r = 8 on all 56 modules."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    return get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    )


def step(model: PeftModel, tokens: Tensor) -> Tensor:
    """Forward and backward, down to the first block's input as in every mask step."""
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_(True)
    loss = model(inputs_embeds=embedded, labels=tokens).loss
    loss.backward()
    return loss


@contextmanager
def frozen(model: PeftModel) -> Iterator[None]:
    """No parameter is trained: the limit."""
    flags = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(False)
    yield
    for parameter, flag in zip(model.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)


@contextmanager
def gates_on_a(model: PeftModel) -> Iterator[None]:
    """What keylayers does."""
    with gated(model, adapter_updates(model), initial_score=2.0):
        yield


@contextmanager
def gates_on_b(model: PeftModel) -> Iterator[None]:
    """The naive place for a gate."""
    handles = []
    with frozen(model):
        for update in adapter_updates(model):
            gate = Gate(2.0, "sigmoid")

            def scale(_: nn.Module, __: Any, hidden: Tensor, gate: Gate = gate) -> Tensor:
                return gate(hidden)

            handles.append(update.layer.lora_B[update.adapter].register_forward_hook(scale))
        yield
        for handle in handles:
            handle.remove()


@contextmanager
def dense_autograd(model: PeftModel) -> Iterator[None]:
    """Full autograd through `θ_0 + γ Δθ`: every merged weight is made in the forward pass."""
    updates = adapter_updates(model)
    with frozen(model):
        for update in updates:
            gate = Gate(2.0, "sigmoid")
            update.layer.forward = _merged(update.layer, update.adapter, gate)
        yield
        for update in updates:
            del update.layer.forward


def _merged(layer: Any, adapter: str, gate: Gate) -> Callable[[Tensor], Tensor]:
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight

    def forward(x: Tensor) -> Tensor:
        delta = layer.scaling[adapter] * (b @ a)
        return nn.functional.linear(x, layer.base_layer.weight + gate(delta))

    return forward


def all_lora(model: PeftModel) -> AbstractContextManager[None]:
    """Ordinary training of all LoRA matrices."""
    return nullcontext()


MODES: dict[str, Callable[[PeftModel], AbstractContextManager[None]]] = {
    "frozen (limit)": frozen,
    "gates on A (keylayers)": gates_on_a,
    "gates on B (naive)": gates_on_b,
    "full autograd on θ_0 + γΔθ": dense_autograd,
    "training all LoRA": all_lora,
}


def kept_storage(model: PeftModel, one_step: Callable[[], object]) -> int:
    """Bytes of distinct storage that one step keeps for its backward pass, parameters excluded."""
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


def run() -> dict[str, Any]:
    """Alternate the modes, print ratios to the limit and return the record."""
    torch.set_num_threads(1)
    model = make_model()
    tokens = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    seconds: dict[str, list[float]] = {name: [] for name in MODES}
    memory = {}
    for name, mode in MODES.items():
        with mode(model):
            memory[name] = kept_storage(model, lambda: step(model, tokens)) / 2**20
    for _ in range(NUM_ROUNDS):
        for name, mode in MODES.items():
            with mode(model):
                model.zero_grad()
                start = time.perf_counter()
                step(model, tokens)
                seconds[name].append(time.perf_counter() - start)
    limit = seconds["frozen (limit)"]
    rows = {}
    for name in MODES:
        ratios = [own / other for own, other in zip(seconds[name], limit, strict=True)]
        rows[name] = {
            "seconds": seconds[name],
            "time_ratio_median": statistics.median(ratios),
            "time_ratio_quartiles": statistics.quantiles(ratios, n=4)[::2],
            "kept_mib": memory[name],
            "kept_ratio": memory[name] / memory["frozen (limit)"],
        }
        low, high = rows[name]["time_ratio_quartiles"]
        print(
            f"{name:<24} time x {rows[name]['time_ratio_median']:.2f} ({low:.2f} to {high:.2f}), "
            f"kept {memory[name]:.0f} MiB, x {rows[name]['kept_ratio']:.2f}"
        )
    return {"batch": BATCH, "tokens": TOKENS, "rounds": NUM_ROUNDS, "modes": rows}
