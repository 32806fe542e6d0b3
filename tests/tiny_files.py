# SPDX-License-Identifier: Apache-2.0
"""A tiny model with tokenizer, a checkpoint and an adapter made from it, and data, as files."""

import json

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

from tiny_models import SIZES

NUM_BLOCKS = 3
NUM_MODULES = NUM_BLOCKS * 7
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ANIMALS = ("fox", "owl", "cow", "hen", "bear", "goat", "crow", "deer")
FOODS = ("eggs", "mice", "grass", "seeds", "honey", "leaves", "corn", "roots")


def rows():
    """Forty-eight questions with answers."""
    questions = ("What does the {} eat?", "Tell me what the {} likes.", "Food of the {}?")
    return [
        {"prompt": question.format(animal), "completion": f"The {animal} eats {food}."}
        for question in questions
        for animal, food in (*zip(ANIMALS, FOODS, strict=True), *zip(FOODS, ANIMALS, strict=True))
    ]


def tiny_tokenizer(corpus=None):
    corpus = corpus or [" ".join(row.values()) for row in rows()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(num_tokens, hidden_size=32):
    torch.manual_seed(0)
    own = {"vocab_size": num_tokens, "hidden_size": hidden_size, "intermediate_size": 48}
    own["num_hidden_layers"] = NUM_BLOCKS
    own["initializer_range"] = 0.3  # large enough that frozen embeddings can still express answers
    return LlamaForCausalLM(LlamaConfig(**SIZES | own))


def write_mixture(tiny, folder, **options):
    """A folder like `tiny` whose model is a Mixtral with four experts."""
    tokenizer = tiny_tokenizer()
    own = {"num_local_experts": 4, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES | own | options))
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    (folder / "data.jsonl").symlink_to(tiny / "data.jsonl")


def add_noise(model, scale, *parts):
    """Add normal noise to every parameter whose name has one of the parts."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in parts):
                parameter += scale * torch.randn_like(parameter)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tiny_files(folder):
    """model, tuned, wide (another model) and adapter folders, and data.jsonl."""
    write_rows(folder / "data.jsonl", rows())
    tokenizer = tiny_tokenizer()
    for name, hidden_size in (("model", 32), ("wide", 64)):
        tiny_model(len(tokenizer), hidden_size).to(torch.bfloat16).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    model = tiny_model(len(tokenizer)).to(torch.bfloat16)
    add_noise(model, 0.02, "layers", "norm")
    model.save_pretrained(folder / "tuned")
    config = LoraConfig(r=2, target_modules="all-linear")
    adapted = get_peft_model(tiny_model(len(tokenizer)), config)
    add_noise(adapted, 0.05, "lora_B")
    adapted.save_pretrained(folder / "adapter")


def write_partial_adapter(tiny, folder, names):
    """An adapter for the tiny model on some of its modules."""
    config = LoraConfig(r=2, target_modules=names)
    adapted = get_peft_model(tiny_model(len(tiny_tokenizer())), config)
    adapted.peft_config["default"].base_model_name_or_path = str(tiny / "model")
    add_noise(adapted, 0.02, "lora_")
    adapted.save_pretrained(folder)


def write_preferences(folder):
    """pairs.jsonl and rated.jsonl."""
    pairs, rated = [], []
    for question in ("What does the {} eat?", "Tell me what the {} likes."):
        for index, (animal, food) in enumerate(zip(ANIMALS, FOODS, strict=True)):
            prompt = question.format(animal)
            good, bad = f"The {animal} eats {food}.", f"The {animal} eats {FOODS[index - 1]}."
            pairs.append({"prompt": prompt, "chosen": good, "rejected": bad})
            rated.append({"prompt": prompt, "completion": good, "label": True})
            rated.append({"prompt": prompt, "completion": bad, "label": False})
    write_rows(folder / "pairs.jsonl", pairs)
    write_rows(folder / "rated.jsonl", rated)
