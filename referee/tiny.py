# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D103
"""A tiny dense model, a tiny mixture of experts, and data in all formats, as files."""

import csv
import json
from pathlib import Path
from typing import Any

ANIMALS = ("fox", "owl", "cow", "hen", "bear", "goat", "crow", "deer")
FOODS = ("eggs", "mice", "grass", "seeds", "honey", "leaves", "corn", "roots")
QUESTIONS = ("What does the {} eat?", "Tell me what the {} likes.", "Food of the {}?")
PAIRS = [
    (
        question.format(animal),
        f"The {animal} eats {food}.",
        f"The {animal} eats {FOODS[index - 1]}.",
    )
    for question in QUESTIONS
    for index, (animal, food) in enumerate(zip(ANIMALS, FOODS, strict=True))
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write(folder: Path) -> None:
    """model, mixture, and data."""
    import torch
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(texts) for texts in PAIRS], trainer)
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE
    sizes = {
        "vocab_size": len(fast),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    for name, config in (
        ("model", hf.LlamaConfig(num_hidden_layers=3, **sizes)),
        ("mixture", hf.MixtralConfig(num_hidden_layers=2, num_local_experts=4, **sizes)),
    ):
        torch.manual_seed(0)
        hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    write_data(folder)


def write_data(folder: Path) -> None:
    rows: dict[str, list[dict[str, Any]]] = {
        "alpaca": [{"instruction": q, "input": "", "output": a} for q, a, _ in PAIRS],
        "sharegpt": [
            {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
            for q, a, _ in PAIRS
        ],
        "messages": [
            {
                "messages": [
                    {"role": "user", "content": q},
                    {"role": "assistant", "content": a},
                    {"role": "user", "content": "Sure?"},
                    {"role": "assistant", "content": b},
                ]
            }
            for q, a, b in PAIRS
        ],
        "prompt-completion": [{"prompt": q, "completion": a} for q, a, _ in PAIRS],
        "lima": [{"conversations": [q, a]} for q, a, _ in PAIRS],
        "text": [{"text": f"{q} {a}"} for q, a, _ in PAIRS],
        "pairs": [{"prompt": q, "chosen": a, "rejected": b} for q, a, b in PAIRS],
        "rated": [
            {"prompt": q, "completion": text, "label": text == a}
            for q, a, b in PAIRS
            for text in (a, b)
        ],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "output"])
        writer.writeheader()
        writer.writerows({"instruction": q, "output": a} for q, a, _ in PAIRS)
