# SPDX-License-Identifier: Apache-2.0
"""Trainers as a user builds them, one for each objective, on a tiny model."""

import copy
import os

import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from tiny_files import ANIMALS, FOODS, NUM_BLOCKS, tiny_model, tiny_tokenizer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

KINDS = ("sft", "dpo", "kto", "orpo", "reward", "grpo", "own loss")
NUM_ROWS = 12
MODULES = ("q_proj", "v_proj", "o_proj", "down_proj")
NUM_UPDATES = NUM_BLOCKS * len(MODULES)
TOKENIZER = tiny_tokenizer()


def lora(task_type="CAUSAL_LM"):
    return LoraConfig(r=2, lora_alpha=4, target_modules=list(MODULES), task_type=task_type)


def base_model(kind="sft"):
    if kind != "reward":
        return tiny_model(len(TOKENIZER))
    config = LlamaConfig(**{**tiny_model(len(TOKENIZER)).config.to_dict(), "num_labels": 1})
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


def move(model, seed=1):
    """Give every LoRA B (and a new head) of the adapter values, as training would."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                nn.init.normal_(parameter, std=0.1)


def rows(kind):
    prompts = [f"What does the {animal} eat?" for animal in (*ANIMALS, *ANIMALS[:4])][:NUM_ROWS]
    good = [f"The {animal} eats {food}." for animal, food in zip(ANIMALS, FOODS, strict=True)]
    good = [f"{one} Always." if index % 2 else one for index, one in enumerate(good * 2)][:NUM_ROWS]
    prompts[1::3] = [f"{prompt} Tell me." for prompt in prompts[1::3]]
    bad = good[3:] + good[:3]
    if kind == "sft" or kind == "own loss":
        return {"prompt": prompts, "completion": good}
    if kind == "kto":
        labels = [index % 2 == 0 for index in range(NUM_ROWS)]
        return {"prompt": prompts, "completion": good, "label": labels}
    if kind == "grpo":
        return {"prompt": prompts, "food": list((FOODS * 2)[:NUM_ROWS])}
    return {"prompt": prompts, "chosen": good, "rejected": bad}


def as_chat(columns):
    def turn(text, role):
        return [{"role": role, "content": text}]

    roles = {"prompt": "user", "completion": "assistant", "chosen": "assistant"}
    roles["rejected"] = "assistant"
    return {
        name: [turn(text, roles[name]) for text in values] if name in roles else values
        for name, values in columns.items()
    }


def num_letters(completions, **columns):
    return [float(sum(letter in "aeiou" for letter in str(one))) for one in completions]


class OwnLossTrainer(Trainer):
    """A loss of one's own: the squared distance of the sequence's log-likelihood from -1."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"]).logits
        tokens = inputs["input_ids"][:, 1:]
        likelihood = logits[:, :-1].log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
        return (likelihood.mean(dim=1) + 1).square().mean()


def settings(folder, **more):
    return {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        **more,
    }


def build(kind, folder, *, is_ready=False, model=None, **more):
    """A trainer; its adapter comes from `peft_config`, or is on the model already (`is_ready`)."""
    import trl

    model = base_model(kind) if model is None else model
    adapter = lora("SEQ_CLS" if kind == "reward" else "CAUSAL_LM")
    if is_ready:
        model = get_peft_model(model, adapter)
        move(model)
    trl_settings = {"bf16": False, "activation_checkpointing": False}
    if kind == "own loss":
        if not is_ready:
            model = get_peft_model(model, adapter)
        tokens = [TOKENIZER(text)["input_ids"][:5] for text in rows(kind)["completion"]]
        return OwnLossTrainer(
            model=model,
            args=TrainingArguments(**settings(folder, **more)),
            train_dataset=Dataset.from_dict({"input_ids": tokens}),
        )
    classes = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
        "reward": (trl.RewardTrainer, trl.RewardConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
    }
    if kind == "orpo":
        from trl.experimental.orpo import ORPOConfig, ORPOTrainer

        classes["orpo"] = (ORPOTrainer, ORPOConfig)
    trainer_class, config_class = classes[kind]
    own = {}
    if kind == "grpo":
        own = {"reward_funcs": num_letters}
        more = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, **more}
    data = DatasetDict(
        train=Dataset.from_dict(as_chat(rows(kind))), other=Dataset.from_dict(as_chat(rows(kind)))
    )
    return trainer_class(
        model=model,
        args=config_class(**settings(folder, **trl_settings, **more)),
        train_dataset=data["train"],
        eval_dataset=DatasetDict(other=data["other"]),
        processing_class=copy.deepcopy(TOKENIZER),
        **own,
        **({} if is_ready else {"peft_config": adapter}),
    )
