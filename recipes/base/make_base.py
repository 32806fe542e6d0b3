# SPDX-License-Identifier: Apache-2.0
"""Make the built-in base model: `python recipes/base/make_base.py --output DIR`.

A Llama of about a million parameters, pre-trained from scratch on the text of `prose.py`.
The chat markers `<|user|>` and `<|assistant|>` never occur in pre-training, as in many real base
models: a fine-tune has to learn what they mean. Takes some fifteen minutes on one core.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from prose import pretraining_lines

VOCABULARY = 1024
CONTEXT_TOKENS = 128
NUM_STEPS = 2000
BATCH_SIZE = 32
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}"
    "<|assistant|>{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}<|user|>{{ m['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `lines`; encodes any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        model_max_length=256,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(num_tokens: int) -> LlamaForCausalLM:
    """The untrained model: 8 blocks of width 96."""
    config = LlamaConfig(
        vocab_size=num_tokens,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def packed(lines: list[str], tokenizer: PreTrainedTokenizerFast) -> Dataset:
    """All lines in a row, each closed by the end token, cut into pieces of equal length."""
    stream: list[int] = []
    for ids in tokenizer(lines, add_special_tokens=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    pieces = [
        stream[start : start + CONTEXT_TOKENS]
        for start in range(0, len(stream) - CONTEXT_TOKENS, CONTEXT_TOKENS)
    ]
    return Dataset.from_dict({"input_ids": pieces, "labels": pieces})


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=NUM_STEPS)
    arguments = parser.parse_args()
    set_seed(0)
    torch.set_num_threads(1)
    lines = pretraining_lines(120_000, seed=0)
    tokenizer = make_tokenizer(lines[:20_000])
    data = packed(lines, tokenizer)
    model = make_model(len(tokenizer))
    print(f"{model.num_parameters():,} parameters, {len(data):,} pieces of {CONTEXT_TOKENS} tokens")
    training = TrainingArguments(
        output_dir=str(arguments.output),
        max_steps=arguments.steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=100,
        weight_decay=0.01,
        save_strategy="no",
        logging_steps=50,
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    Trainer(model=model, args=training, train_dataset=data).train()
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)


if __name__ == "__main__":
    main()
