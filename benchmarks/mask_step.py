# SPDX-License-Identifier: Apache-2.0
"""A mask step against its limit: time, and memory kept for the backward pass.

The limit is a bare forward and backward pass for activations through the frozen model with its LoRA
updates. Gates are of modules, or of rank-one parts. For comparison: gates on the output of B (the
naive place), autograd through the merged weight, and training all LoRA matrices.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from benchmarks.sides import in_turn, kept_storage, random_llama, ratio, shown, with_lora
from keylayers.gates import gated
from keylayers.updates import adapter_updates
from keylayers.updates.gate import Gate

NUM_ROUNDS = 12
BATCH, TOKENS, VOCABULARY = 4, 256, 1024


def make_model() -> PeftModel:
    """A random Llama with 26 M parameters and LoRA r = 8 on all 56 modules."""
    return with_lora(random_llama(512, 8, VOCABULARY))


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
def by_example(model: PeftModel) -> Iterator[None]:
    """Gates of rank-one parts, of which every example has its own copy (`fisher-pruning`)."""
    own = {"initial_score": 1.0, "link": "identity", "granularity": "part"}
    with gated(model, adapter_updates(model), **own) as gates, gates.by_example():
        yield


@contextmanager
def dense_autograd(model: PeftModel) -> Iterator[None]:
    """Full autograd through `θ_0 + γ Δθ`: every merged weight is made in the forward pass."""
    updates = adapter_updates(model)
    with frozen(model):
        for update in updates:
            update.layer.forward = _merged(update.layer, update.adapter, Gate(2.0, "sigmoid"))
        yield
        for update in updates:
            del update.layer.forward


def _merged(layer: Any, adapter: str, gate: Gate) -> Callable[[Tensor], Tensor]:
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight

    def forward(x: Tensor) -> Tensor:
        delta = layer.scaling[adapter] * (b @ a)
        return nn.functional.linear(x, layer.base_layer.weight + gate(delta))

    return forward


LIMIT = "frozen (limit)"
MODES: dict[str, Callable[[PeftModel], AbstractContextManager[object]]] = {
    LIMIT: frozen,
    "gates on A (keylayers)": lambda model: gated(model, adapter_updates(model), initial_score=2.0),
    "gates on parts (keylayers)": lambda model: gated(
        model, adapter_updates(model), initial_score=2.0, granularity="part"
    ),
    "gates on parts, by example": by_example,
    "gates on B (naive)": gates_on_b,
    "full autograd on θ_0 + γΔθ": dense_autograd,
    "training all LoRA": lambda model: nullcontext(),
}


def measured(
    model: PeftModel, tokens: Tensor, modes: list[str], num_rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of a step in each mode, round by round, and the MiB it keeps for backward."""
    kept = {}
    for name in modes:
        with MODES[name](model):
            kept[name] = kept_storage(model, lambda: step(model, tokens)) / 2**20
    seconds: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(num_rounds):
        for name in modes:
            with MODES[name](model):  # gates are put in once for many steps: not timed
                model.zero_grad()
                seconds[name] += in_turn({name: lambda: step(model, tokens)}, 1)[name]
    return seconds, kept


def run() -> dict[str, Any]:
    """Alternate the modes, print ratios to the limit and return the record."""
    tokens = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    seconds, kept = measured(make_model(), tokens, [*MODES], NUM_ROUNDS)
    rows = {}
    for name in MODES:
        rows[name] = {"seconds": seconds[name], **ratio(seconds[name], seconds[LIMIT])}
        rows[name] |= {"kept_mib": kept[name], "kept_ratio": kept[name] / kept[LIMIT]}
        print(f"{name:<28} time x {shown(rows[name])}, kept x {rows[name]['kept_ratio']:.2f}")
    return {"batch": BATCH, "tokens": TOKENS, "rounds": NUM_ROUNDS, "modes": rows}
