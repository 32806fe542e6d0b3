# SPDX-License-Identifier: Apache-2.0
"""Trainers as users build them, on tiny models: every objective, an adapter in both ways."""

import warnings

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification, Trainer, TrainingArguments

from scored import arguments
from tiny_files import rows, tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def answered(first=0):
    return Dataset.from_list(rows()[first : first + 8])


def preferences(first=0):
    """Questions with a right and a wrong answer, of different lengths."""
    answers = answered(first)["completion"]
    pairs = answered(first).rename_column("completion", "chosen")
    return pairs.add_column("rejected", [*answers[1:], answers[0]])


def judged(first=0):
    """Questions with answers that are right every other time."""
    return answered(first).add_column("label", [True, False] * 4)


def prompts(first=0):
    return answered(first).select_columns("prompt")


def tokens():
    texts = [row["prompt"] + row["completion"] for row in answered()]
    ids = [row[:12] for row in TOKENIZER(texts)["input_ids"]]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def length_reward(completions, **_):
    """How many different letters a completion has: some reward that completions differ in."""
    return [float(len(set(text))) for text in completions]


class WithOwnLoss(Trainer):
    """A subclass with a loss of its own: the mean cube root of the token losses."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")  # losses may take columns out
        logits = model(**inputs).logits[:, :-1].flatten(0, 1)
        each = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="none")
        return (each + 0.1).pow(1 / 3).mean()


def classes_of(kind):
    """The trainer and its configuration."""
    if kind not in FROM_TRL:
        return WithOwnLoss if kind == "own loss" else Trainer, TrainingArguments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations of third parties at import
        import trl
        from trl.experimental import orpo
    place = orpo if kind == "ORPO" else trl
    return getattr(place, f"{kind}Trainer"), getattr(place, f"{kind}Config")


DATA = {
    "SFT": answered, "DPO": preferences, "KTO": judged, "ORPO": preferences, "Reward": preferences,
    "GRPO": prompts, "plain": tokens, "own loss": tokens,
}  # fmt: skip
# TRL's trainers take a `peft_config` or a ready model; transformers' own takes a ready model.
FROM_TRL = ("SFT", "DPO", "KTO", "ORPO", "Reward", "GRPO")
CASES = [(kind, "config") for kind in FROM_TRL] + [(kind, "model") for kind in DATA]
OPTIONS = {
    "KTO": {"beta": 0.5},
    "ORPO": {"max_length": 64},
    # With a reference, with a loss that depends on the model's own probabilities, and without a
    # kink where tests take differences.
    "GRPO": {
        "beta": 0.1, "num_iterations": 2, "epsilon": 0.9, "epsilon_high": 9.0,
        "num_generations": 2, "max_completion_length": 6,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
    },
}  # fmt: skip


def lora(kind, **options):
    own = {"task_type": "CAUSAL_LM"}
    if kind == "Reward":
        own = {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    return LoraConfig(**{"r": 2, "target_modules": "all-linear"} | own | options)


def base_model(kind):
    plain = tiny_model(len(TOKENIZER))
    if kind != "Reward":
        return plain
    config = plain.config
    config.num_labels = 1
    torch.manual_seed(1)
    return LlamaForSequenceClassification(config)


def with_noise(model, std=0.1, seed=3):
    """The trained adapter's B away from zero, so that every gate has something to scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter += std * torch.randn(parameter.shape, generator=generator)
    return model


def build(kind, way, *, is_trained=True, is_moved=True, data=None, peft=None, own=None, **options):
    """A trainer, or one of an `own` class, with a `peft_config` or around a ready `PeftModel`."""
    usual_class, config_class = classes_of(kind)
    named = {"processing_class": TOKENIZER} if kind in FROM_TRL else {}
    if kind == "GRPO":
        named["reward_funcs"] = length_reward
    model, peft = base_model(kind), peft or lora(kind)
    if way == "config":
        named["peft_config"] = peft
    else:
        model = with_noise(get_peft_model(model, peft))
    options = {"max_steps": 2, "learning_rate": 0.01} | OPTIONS.get(kind, {}) | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what TRL says of its own defaults
        trainer = (own or usual_class)(
            model=model,
            args=arguments(config_class, **options),
            train_dataset=DATA[kind]() if data is None else data,
            **named,
        )
        if is_trained:
            trainer.train()
    if is_moved:
        with_noise(trainer.model, seed=4)
    return trainer
