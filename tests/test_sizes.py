# SPDX-License-Identifier: Apache-2.0
"""Half precision, both kinds of checkpointing, packing, many modules, long sequences."""

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from commands import keylayers, read
from keylayers import rank_modules
from scored import arguments
from tiny_files import rows, tiny_model, tiny_tokenizer, write_rows
from trainers import TOKENIZER, lora, with_noise


def sft(dtype=torch.float32, **options):
    """An SFT trainer on four short texts, all in one batch."""
    model = with_noise(get_peft_model(tiny_model(len(TOKENIZER)).to(dtype), lora("SFT")))
    plain = {"activation_checkpointing": False, "max_length": 64, "learning_rate": 0.01}
    texts = Dataset.from_list([{"text": row["completion"]} for row in rows()[:4]])
    config = arguments(SFTConfig, **plain | options)
    return SFTTrainer(model, config, train_dataset=texts, processing_class=TOKENIZER)


def scored(trainer, method, **options):
    modules = rank_modules(trainer, method, **options).modules
    return torch.tensor([module.score for module in modules])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_nearly_alike_by_gates_that_stay_float32(dtype):
    eps = torch.finfo(dtype).eps
    exact, rounded = (scored(sft(one), "path", mask_batches=1) for one in (torch.float32, dtype))
    assert 0 < (exact - rounded).norm() / exact.norm() < 16 * eps  # sums over many roundings
    learned = scored(sft(dtype), "ila", mask_steps=3, mask_learning_rate=1e-3)
    moved = (learned - 1.0).abs()  # from where they began
    assert 0 < moved.min() <= moved.max() < eps


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    ("method", "options"), [("elimination", {"mask_batches": 1}), ("ila", {"mask_steps": 4})]
)
def test_recomputed_activations_give_the_same_scores(method, options, use_reentrant):
    more = {"activation_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    recomputed = scored(sft(activation_checkpointing=True, **more), method, **options)
    torch.testing.assert_close(recomputed, scored(sft(), method, **options), atol=1e-6, rtol=1e-4)


def test_packed_texts_give_the_scores_of_a_batch_of_them():
    trainers = sft(packing=True, per_device_train_batch_size=1), sft()
    assert [len(trainer.train_dataset) for trainer in trainers] == [1, 4]
    packed, apart = (scored(one, "path", mask_batches=1, path_points=3) for one in trainers)
    torch.testing.assert_close(packed, apart, atol=1e-6, rtol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(("num_blocks", "num_tokens"), [(80, 64), (2, 4096)])
def test_many_modules_and_long_sequences_are_ranked_and_trained(num_blocks, num_tokens, tmp_path):
    tokenizer = tiny_tokenizer()
    config = tiny_model(len(tokenizer), hidden_size=16).config
    config.num_hidden_layers, config.max_position_embeddings = num_blocks, num_tokens
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = "The fox eats mice and the hen eats seeds while the bear eats honey. " * 400
    write_rows(tmp_path / "long.jsonl", [{"text": f"{number} {text}"} for number in range(6)])

    inputs = ("--model", tmp_path / "model", "--data", tmp_path / "long.jsonl", "--held-out", 1)
    small = ("--max-length", num_tokens, "--batch-size", 1, "--lora-rank", 2, "--max-steps", 2)
    output = tmp_path / "out"
    assert keylayers("rank", *inputs, *small, "--mask-batches", 1, "--output", output) == 0
    assert read(output)["provenance"]["data"]["max_length"] == num_tokens
    ranks = [module["rank"] for module in read(output)["modules"]]
    assert sorted(ranks) == list(range(1, 7 * num_blocks + 1))
    train = ("train", "--ranking", output, "--budget", 0.3, "--gradient-checkpointing")
    assert keylayers(*train, "--output", tmp_path / "tuned") == 0
