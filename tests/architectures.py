# SPDX-License-Identifier: Apache-2.0
"""Architectures built from a config with random weights, and the whole way from LoRA to reload.

python tests/architectures.py        # the table in docs/architectures.md
"""

import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY = 64
BLOCKS = 2
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    **TOKENS,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 8}


@dataclass(frozen=True)
class Architecture:
    """How to build a tiny model of one kind, and what it is fed.

    Attributes:
        title: Name for people.
        config: Makes its configuration.
        model: Class that takes the configuration.
        task: PEFT's word for what the model does.
        towers: Which stacks of blocks are ranked.
        batch: Inputs with labels.
    """

    title: str
    config: Callable[[], hf.PreTrainedConfig]
    model: Any = hf.AutoModelForCausalLM
    task: str = "CAUSAL_LM"
    towers: str = "language"
    batch: Callable[[], dict[str, Tensor]] = lambda: text_batch()

    def build(self) -> hf.PreTrainedModel:
        torch.manual_seed(0)
        make = getattr(self.model, "from_config", self.model)
        return make(self.config()).eval()


def tokens(num_rows: int = 4, length: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY - 1, (num_rows, length), generator=generator)


def text_batch() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "labels": tokens()}


def labelled_batch() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "labels": torch.tensor([0, 1, 1, 0])}


def image_batch() -> dict[str, Tensor]:
    ids = tokens()
    ids[:, :4] = VOCABULARY - 1  # places of the image's four patches
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    return {"input_ids": ids, "pixel_values": pixels, "labels": ids}


def sized(config: Callable[..., hf.PreTrainedConfig], **other: Any) -> Callable[[], Any]:
    return lambda: config(**{**SIZES, **other})


def llava() -> hf.PreTrainedConfig:
    vision = hf.CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    return hf.LlavaConfig(
        vision_config=vision,
        text_config=hf.LlamaConfig(**SIZES),
        image_token_index=VOCABULARY - 1,
        image_token_id=VOCABULARY - 1,
        vision_feature_layer=-1,
    )


def t5() -> hf.PreTrainedConfig:
    return hf.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=BLOCKS,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )


VISION = Architecture("LLaVA", llava, hf.AutoModelForImageTextToText, batch=image_batch)
ARCHITECTURES = (
    Architecture("Llama", sized(hf.LlamaConfig)),
    Architecture("Mistral", sized(hf.MistralConfig, head_dim=8)),
    Architecture("Qwen2", sized(hf.Qwen2Config)),
    Architecture("Qwen3", sized(hf.Qwen3Config, head_dim=8)),
    Architecture("Gemma 2", sized(hf.Gemma2Config, head_dim=8)),
    Architecture("Gemma 3", sized(hf.Gemma3TextConfig, head_dim=8)),
    Architecture("Phi-3", sized(hf.Phi3Config)),
    Architecture(
        "GPT-2",
        lambda: hf.GPT2Config(
            vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=BLOCKS, n_head=2, **TOKENS
        ),
    ),
    Architecture("GPT-NeoX", sized(hf.GPTNeoXConfig)),
    Architecture("OPT", sized(hf.OPTConfig, ffn_dim=24, word_embed_proj_dim=16)),
    Architecture("BLOOM", sized(hf.BloomConfig, n_layer=BLOCKS, n_head=2)),
    Architecture("Falcon", sized(hf.FalconConfig)),
    Architecture("StableLM", sized(hf.StableLmConfig)),
    Architecture("OLMo", sized(hf.OlmoConfig)),
    Architecture("OLMo 2", sized(hf.Olmo2Config)),
    Architecture("Granite", sized(hf.GraniteConfig)),
    Architecture("Cohere", sized(hf.CohereConfig)),
    Architecture("Mixtral", sized(hf.MixtralConfig, num_local_experts=4)),
    Architecture(
        "Qwen3-MoE",
        sized(hf.Qwen3MoeConfig, num_experts=4, mlp_only_layers=[0], head_dim=8, **EXPERTS),
    ),
    Architecture(
        "DeepSeek-V3",
        sized(
            hf.DeepseekV3Config,
            num_key_value_heads=2,
            n_routed_experts=4,
            n_group=1,
            topk_group=1,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=8,
            v_head_dim=8,
            **EXPERTS,
        ),
    ),
    Architecture(
        "Mamba",
        sized(hf.MambaConfig, state_size=4, time_step_rank=4, expand=2, conv_kernel=4),
    ),
    Architecture("T5", t5, hf.AutoModelForSeq2SeqLM, task="SEQ_2_SEQ_LM"),
    VISION,
    replace(VISION, title="LLaVA, all towers", towers="all"),
    Architecture(
        "BERT, classification",
        sized(hf.BertConfig, num_labels=2),
        hf.AutoModelForSequenceClassification,
        task="SEQ_CLS",
        batch=labelled_batch,
    ),
)


@dataclass(frozen=True)
class Outcome:
    """What the whole way showed.

    Attributes:
        projections: Kinds of modules, in model order.
        num_modules: Modules that were ranked.
        num_blocks: Blocks that hold them.
        open_error, closed_error: Loss with all gates open against the tuned model's, and closed
            against the base model's, in nats.
        selected, changed: Modules asked for, and those whose weights training changed.
        reload_error: Largest difference of a logit between the trained and the reloaded model.
    """

    projections: tuple[str, ...]
    num_modules: int
    num_blocks: int
    open_error: float
    closed_error: float
    selected: frozenset[str]
    changed: frozenset[str]
    reload_error: float


def whole_way(architecture: Architecture) -> Outcome:
    """LoRA on all modules, rank, select, train the selection from scratch, save, reload."""
    from keylayers import rank_modules
    from keylayers.apply.trainable import add_lora
    from keylayers.model.modules import map_modules

    base = architecture.build()
    infos = map_modules(base, architecture.towers)
    options = {"r": 2, "lora_alpha": 8, "task_type": architecture.task}
    trainer = trainer_of(add_lora(base, [info.name for info in infos], **options), architecture)
    trainer.train()
    ranking = rank_modules(trainer, method="path", mask_batches=1, path_points=2)
    assert {one.name for one in ranking.modules} == {info.name for info in infos}
    selection = ranking.select(0.3)
    open_error, closed_error = gate_errors(trainer, architecture)
    fresh = hf_peft().get_peft_model(
        architecture.build(),
        selection.lora_config(r=2, lora_alpha=8, task_type=architecture.task),
    )
    changed = changed_modules(trainer_of(fresh, architecture))
    return Outcome(
        projections=tuple(dict.fromkeys(info.projection for info in infos)),
        num_modules=len(infos),
        num_blocks=len({info.block_index for info in infos}),
        open_error=open_error,
        closed_error=closed_error,
        selected=frozenset(selection.names),
        changed=changed,
        reload_error=reload_error(fresh, architecture),
    )


def hf_peft() -> Any:
    import peft

    return peft


def trainer_of(model: nn.Module, architecture: Architecture) -> hf.Trainer:
    """A plain trainer: three float32 steps at a high learning rate."""
    rows = architecture.batch()
    examples = [
        {name: values[row] for name, values in rows.items()} for row in range(len(rows["labels"]))
    ]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = hf.TrainingArguments(
            output_dir=scratch,
            max_steps=3,
            learning_rate=0.05,
            per_device_train_batch_size=4,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=True,
        )
    trainer = hf.Trainer(model=model, args=arguments, train_dataset=examples)
    trainer.remove_callback(hf.PrinterCallback)
    return trainer


def gate_errors(trainer: hf.Trainer, architecture: Architecture) -> tuple[float, float]:
    """Losses with gates all open and all closed against the tuned and the base model's."""
    from keylayers.gates import gated
    from keylayers.updates import adapter_updates

    model, batch = trainer.model.eval(), architecture.batch()
    with torch.no_grad():
        tuned = float(model(**batch).loss)
        with model.disable_adapter():
            base = float(model(**batch).loss)
        found = []
        for value in (1.0, 0.0):
            updates = adapter_updates(model)
            with gated(model, updates, initial_score=value, link="identity"):
                found.append(float(model(**batch).loss))
    if architecture.task == "SEQ_CLS":  # closed gates leave the trained head on
        base = found[1]
    assert abs(tuned - base) > 1e-3 or architecture.task == "SEQ_CLS"
    return abs(found[0] - tuned), abs(found[1] - base)


def changed_modules(trainer: hf.Trainer) -> frozenset[str]:
    """Train, and name the modules of which a weight changed; a head is always trained."""
    from keylayers.updates.adapter import own_parameters, tuner_layers

    model = trainer.model
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    trainer.train()
    owners = {
        id(one): name
        for name, layer in tuner_layers(model).items()
        for one in own_parameters(layer)
    }
    return frozenset(
        owners.get(id(one), name)
        for name, one in model.named_parameters()
        if not torch.equal(one, before[name]) and ".modules_to_save." not in name
    )


def reload_error(model: nn.Module, architecture: Architecture) -> float:
    """Save the adapter, load it on a fresh base with plain PEFT, compare the logits."""
    batch: Mapping[str, Tensor] = architecture.batch()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert (Path(folder) / "adapter_model.safetensors").is_file()
        loaded = hf_peft().PeftModel.from_pretrained(architecture.build(), folder)
    with torch.no_grad():
        mine, other = model.eval()(**batch).logits, loaded.eval()(**batch).logits
    return float((mine - other).abs().max())


def table_row(architecture: Architecture, outcome: Outcome) -> str:
    """The row of docs/architectures.md."""
    kinds = ", ".join(f"`{one}`" for one in outcome.projections)
    return f"| {architecture.title} | {outcome.num_blocks} | {outcome.num_modules} | {kinds} |"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for one in ARCHITECTURES:
        sys.stdout.write(table_row(one, whole_way(one)) + "\n")
