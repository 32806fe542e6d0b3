# SPDX-License-Identifier: Apache-2.0
"""Tiny models built from a config with random weights: the real code path, no download."""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "num_hidden_layers": 2,
    "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def tiny_llama(num_blocks: int = 2, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"num_hidden_layers": num_blocks} | options)
    return LlamaForCausalLM(config).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**SIZES)).eval()


class Experts(nn.Module):
    """Three of them, which all take part in equal shares: every step of it runs in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(0.3 * torch.randn(3, 16, 8))
        self.down_proj = nn.Parameter(0.3 * torch.randn(3, 8, 16))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        inner = torch.tanh(torch.einsum("bti,eoi->beto", hidden, self.up_proj))
        return torch.einsum("beto,eio->bti", inner, self.down_proj) / 3


class TinyExperts(nn.Module):
    """A mixture of two blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(VOCABULARY, 8)
        blocks = [nn.ModuleDict({"mix": nn.Linear(8, 8), "experts": Experts()}) for _ in range(2)]
        self.layers = nn.ModuleList(blocks)
        self.lm_head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        hidden = self.embed_tokens(input_ids)
        for block in self.layers:
            mixed = block["mix"](hidden).cumsum(dim=1)
            hidden = hidden + torch.tanh(mixed) + block["experts"](hidden)
        return SimpleNamespace(logits=self.lm_head(hidden))


def in_float64(model: nn.Module) -> nn.Module:
    """The model in float64; Llama's RMSNorm computes in float32 and is replaced."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)
    return model.double()


def token_loss(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss in nats in the model's dtype (transformers' own is float32)."""
    logits = model(input_ids=input_ids).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())


def some_tokens(num_rows: int = 3, length: int = 10, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (num_rows, length), generator=generator)


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that work on a model could leave changed, with the random state, part by part.

    Not Python's own random state: the shape checks of these tests draw from it.
    """
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        "weights": {name: value.tolist() for name, value in model.state_dict().items()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "gradients": {name: None if g is None else g.tolist() for name, g in gradients.items()},
        "modules": {name: (id(m), m.training) for name, m in model.named_modules()},
        "attributes": {name: sorted(vars(m)) for name, m in model.named_modules()},
        "hooks": [(list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()],
        "random": (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()),
    }


@contextlib.contextmanager
def unchanged(owner: Any, state: Callable[[Any], dict[str, Any]] = state_of) -> Iterator[None]:
    """A model, or what else has a state, must be afterwards as it was, whatever happens to it."""
    before = state(owner)
    yield
    after = state(owner)
    for part, value in before.items():
        assert after[part] == value, part


def with_random_lora(model: nn.Module, kind: type = LoraConfig, **options: Any) -> PeftModel:
    """`model` with an adapter whose parameters are random; magnitudes grow by up to a third."""
    fixed = {"r": 3, "target_modules": "all-linear"}
    fixed["fan_in_fan_out"] = isinstance(model, GPT2LMHeadModel)
    tuned = get_peft_model(model, kind(**fixed | options))
    torch.manual_seed(3)
    for name, parameter in tuned.named_parameters():
        if "lora_magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        elif "lora_" in name and "ranknum" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return tuned
