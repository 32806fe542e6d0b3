# SPDX-License-Identifier: Apache-2.0
"""Architectures built from a config with random weights, and what training changes in them.

python tests/architectures.py        # the table in docs/architectures.md
"""

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from keylayers.model.modules import ModuleInfo, map_modules
from keylayers.updates.adapter import own_parameters, tuner_layers
from scored import arguments

from tiny_models import SIZES, VOCABULARY, some_tokens

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}


@dataclass(frozen=True)
class Architecture:
    """How to build a tiny model of one kind, and a batch for it, with labels."""

    title: str
    config: Callable[..., hf.PreTrainedConfig]
    sizes: Mapping[str, Any] = field(default_factory=dict)  # besides SIZES
    model: Any = hf.AutoModelForCausalLM
    task: str = "CAUSAL_LM"  # in PEFT's words
    towers: str = "language"
    batch: Callable[[], dict[str, Tensor]] = lambda: text_batch()

    def build(self) -> hf.PreTrainedModel:
        torch.manual_seed(0)
        make = getattr(self.model, "from_config", self.model)
        return make(self.config(**{**SIZES, **self.sizes})).eval()


def text_batch() -> dict[str, Tensor]:
    return {"input_ids": some_tokens(4, 12), "labels": some_tokens(4, 12)}


def image_batch() -> dict[str, Tensor]:
    ids = some_tokens(4, 12).clamp(max=VOCABULARY - 2)
    ids[:, :4] = VOCABULARY - 1  # places of the image's four patches
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "pixel_values": pixels, "labels": ids}


def llava(**sizes: Any) -> hf.PreTrainedConfig:
    vision = {"num_key_value_heads": None, "image_size": 8, "patch_size": 4, "projection_dim": 16}
    return hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**SIZES | vision),
        text_config=hf.LlamaConfig(**sizes),
        image_token_index=VOCABULARY - 1,
        image_token_id=VOCABULARY - 1,
        vision_feature_layer=-1,
    )


T5 = {
    "num_layers": 2, "d_kv": 8, "d_ff": 24, "feed_forward_proj": "gated-gelu",
    "decoder_start_token_id": 0,
}  # fmt: skip
QWEN3_MOE = {"num_experts": 4, "mlp_only_layers": [0], "head_dim": 8, **EXPERTS}
DEEPSEEK = {
    "num_key_value_heads": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8, "v_head_dim": 8, **EXPERTS,
}  # fmt: skip
MAMBA = {"state_size": 4, "time_step_rank": 4, "expand": 2, "conv_kernel": 4}
HEAD_DIM = {"head_dim": 8}
VISION = Architecture("LLaVA", llava, model=hf.AutoModelForImageTextToText, batch=image_batch)
CLASSIFIER = Architecture(
    "BERT, classification", hf.BertConfig, {"num_labels": 2},
    hf.AutoModelForSequenceClassification, "SEQ_CLS",
    batch=lambda: text_batch() | {"labels": torch.tensor([0, 1, 1, 0])},
)  # fmt: skip
ARCHITECTURES = (
    Architecture("Llama", hf.LlamaConfig),
    Architecture("Mistral", hf.MistralConfig, HEAD_DIM),
    Architecture("Qwen2", hf.Qwen2Config),
    Architecture("Qwen3", hf.Qwen3Config, HEAD_DIM),
    Architecture("Gemma 2", hf.Gemma2Config, HEAD_DIM),
    Architecture("Gemma 3", hf.Gemma3TextConfig, HEAD_DIM),
    Architecture("Phi-3", hf.Phi3Config),
    Architecture("GPT-2", hf.GPT2Config),
    Architecture("GPT-NeoX", hf.GPTNeoXConfig),
    Architecture("OPT", hf.OPTConfig, {"ffn_dim": 24, "word_embed_proj_dim": 16}),
    Architecture("BLOOM", hf.BloomConfig),
    Architecture("Falcon", hf.FalconConfig),
    Architecture("StableLM", hf.StableLmConfig),
    Architecture("OLMo", hf.OlmoConfig),
    Architecture("OLMo 2", hf.Olmo2Config),
    Architecture("Granite", hf.GraniteConfig),
    Architecture("Cohere", hf.CohereConfig),
    Architecture("Mixtral", hf.MixtralConfig, {"num_local_experts": 4}),
    Architecture("Qwen3-MoE", hf.Qwen3MoeConfig, QWEN3_MOE),
    Architecture("DeepSeek-V3", hf.DeepseekV3Config, DEEPSEEK),
    Architecture("Mamba", hf.MambaConfig, MAMBA),
    Architecture("T5", hf.T5Config, T5, hf.AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
    VISION,
    replace(VISION, title="LLaVA, all towers", towers="all"),
    CLASSIFIER,
)
NAMED = {architecture.title: architecture for architecture in ARCHITECTURES}


def modules_of(architecture: Architecture) -> list[ModuleInfo]:
    return list(map_modules(architecture.build(), architecture.towers))


def table() -> list[str]:
    """The table of docs/architectures.md: architectures with the same modules share a row."""
    rows: dict[tuple[str, int], list[str]] = {}
    for architecture in ARCHITECTURES:
        modules = modules_of(architecture)
        projections = dict.fromkeys(f"`{module.projection}`" for module in modules)
        key = (", ".join(projections), len(modules))
        rows.setdefault(key, []).append(architecture.title)
    return [
        f"| {', '.join(titles)} | {count} | {kinds} |" for (kinds, count), titles in rows.items()
    ]


def trainer_of(model: nn.Module, architecture: Architecture) -> hf.Trainer:
    """A plain trainer: three float32 steps at a high learning rate."""
    columns = architecture.batch()
    examples = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    steps = arguments(max_steps=3, learning_rate=0.05, logging_strategy="no")
    trainer = hf.Trainer(model=model, args=steps, train_dataset=examples)
    trainer.remove_callback(hf.PrinterCallback)
    return trainer


def changed_modules(
    trainer: hf.Trainer, train: Callable[[hf.Trainer], Any] = hf.Trainer.train
) -> set[str]:
    """Train, and name the modules of which a weight changed; a saved head is always trained."""
    model = trainer.model
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    train(trainer)
    owners = {
        id(value): name
        for name, layer in tuner_layers(model).items()
        for value in own_parameters(layer)
    }
    return {
        owners.get(id(value), name.removesuffix(".weight"))
        for name, value in model.named_parameters()
        if not torch.equal(value, before[name]) and ".modules_to_save." not in name
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.stdout.write("\n".join(table()) + "\n")
