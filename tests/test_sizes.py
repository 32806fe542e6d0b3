# SPDX-License-Identifier: Apache-2.0
"""Half precision, both kinds of checkpointing, packing, many modules, long sequences."""

import json

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from commands import keylayers, scores
from tiny_files import rows, tiny_tokenizer
from trainers import TOKENIZER, lora, tiny_model, with_noise

RANK = ("--max-steps", 6, "--mask-batches", 4, "--lora-rank", 4, "--learning-rate", 0.02)
PATH = ("--method", "path")


@pytest.fixture(scope="module")
def in_float32(tiny, tmp_path_factory):
    output = tmp_path_factory.mktemp("float32")
    inputs = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--output", output)
    assert keylayers("rank", *inputs, *RANK, *PATH, "--dtype", "float32") == 0
    return output


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_scores_the_same_adapter_nearly_alike(tiny, in_float32, tmp_path, dtype):
    inputs = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--output", tmp_path)
    adapter = ("--adapter", in_float32 / "adapter", "--mask-batches", 4)
    assert keylayers("rank", *inputs, *PATH, *adapter, "--dtype", dtype) == 0
    exact, rounded = torch.tensor(scores(in_float32)), torch.tensor(scores(tmp_path))
    assert not torch.equal(exact, rounded)
    error = (exact - rounded).norm() / exact.norm()
    assert error < 16 * torch.finfo(getattr(torch, dtype)).eps  # a score sums over many roundings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_stay_float32_in_half_precision_and_small_steps_move_them(dtype):
    from keylayers import rank_modules

    model = with_noise(get_peft_model(tiny_model(len(TOKENIZER)).to(dtype), lora("SFT")))
    found = rank_modules(sft(model), "ila", mask_steps=3, mask_learning_rate=1e-3)
    moved = [abs(one.score - 1.0) for one in found.modules]  # as it was at first
    assert all(0 < distance < torch.finfo(dtype).eps for distance in moved)


def sft(model, **options):
    """An SFT trainer of `model` on four short texts, all in one batch."""
    options = {
        "output_dir": "unused",
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "bf16": False,
        "activation_checkpointing": False,
        "per_device_train_batch_size": 4,
        "max_length": 64,
    } | options
    texts = Dataset.from_list([{"text": row["completion"]} for row in rows()[:4]])
    return SFTTrainer(model, SFTConfig(**options), train_dataset=texts, processing_class=TOKENIZER)


CHECKPOINTED = {
    "recomputed, re-entrant": {"use_reentrant": True},
    "recomputed, not re-entrant": {"use_reentrant": False},
}


@pytest.mark.parametrize("name", CHECKPOINTED)
@pytest.mark.parametrize("method", ["elimination", "ila"])
def test_recomputed_activations_give_the_same_scores(tmp_path, name, method):
    from keylayers import rank_modules

    more = {"mask_steps": 4} if method == "ila" else {"mask_batches": 1}

    def found(**settings):
        model = with_noise(get_peft_model(tiny_model(len(TOKENIZER)), lora("SFT")))
        ranking = rank_modules(sft(model, output_dir=str(tmp_path), **settings), method, **more)
        return torch.tensor([module.score for module in ranking.modules])

    recomputed = found(
        activation_checkpointing=True, activation_checkpointing_kwargs=CHECKPOINTED[name]
    )
    torch.testing.assert_close(recomputed, found(), atol=1e-6, rtol=1e-4)


def test_packed_texts_give_the_scores_of_a_batch_of_them(tmp_path):
    from keylayers import rank_modules

    def scored(**settings):
        model = with_noise(get_peft_model(tiny_model(len(TOKENIZER)), lora("SFT")))
        trainer = sft(model, output_dir=str(tmp_path), **settings)
        ranking = rank_modules(trainer, "path", mask_batches=1, path_points=3)
        found = torch.tensor([module.score for module in ranking.modules])
        return found, len(trainer.train_dataset)

    packed, num_packed = scored(packing=True, per_device_train_batch_size=1)
    apart, num_apart = scored()
    assert (num_packed, num_apart) == (1, 4)
    torch.testing.assert_close(packed, apart, atol=1e-6, rtol=1e-4)


def random_model(folder, num_blocks, max_positions):
    """A model of tiny random weights with its tokenizer, as files."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=num_blocks,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=max_positions,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.long
def test_eighty_blocks_of_seven_modules_are_ranked(tiny, tmp_path):
    model = random_model(tmp_path / "model", 80, 64)
    inputs = ("--model", model, "--data", tiny / "data.jsonl", "--output", tmp_path / "out")
    more = ("--max-steps", 2, "--mask-batches", 1, "--lora-rank", 2, "--batch-size", 4)
    assert keylayers("rank", *inputs, *more) == 0
    modules = json.loads((tmp_path / "out" / "ranking.json").read_text())["modules"]
    assert len(modules) == 560
    assert sorted(module["rank"] for module in modules) == list(range(1, 561))


@pytest.mark.long
def test_sequences_of_4096_tokens_are_ranked_and_trained_on(tmp_path):
    model = random_model(tmp_path / "model", 2, 4096)
    text = "The fox eats mice and the hen eats seeds while the bear eats honey. " * 400
    lines = [json.dumps({"text": f"{number} {text}"}) for number in range(6)]
    (tmp_path / "long.jsonl").write_text("\n".join(lines))
    inputs = ("--model", model, "--data", tmp_path / "long.jsonl", "--max-length", 4096)
    small = ("--batch-size", 1, "--lora-rank", 2, "--held-out", 1)
    output = tmp_path / "out"
    rank = ("rank", *inputs, *small, "--max-steps", 2, "--mask-batches", 1)
    assert keylayers(*rank, "--output", output) == 0
    record = json.loads((output / "ranking.json").read_text())["provenance"]
    assert record["data"]["max_length"] == 4096
    train = ("train", "--ranking", output, "--budget", "0.3", "--gradient-checkpointing")
    assert keylayers(*train, "--output", tmp_path / "tuned") == 0
