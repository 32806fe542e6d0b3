# SPDX-License-Identifier: Apache-2.0
"""Memory of ranking the difference of two checkpoints, against the base model's bare pass.

Both sides run in a process of their own on the same pair of random Llamas (half a billion
parameters, float32) and the same batch, one after the other, and report the peak of what they
held after loading. The goal: ranking needs no more than the bare pass and the largest module.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from keylayers.model.loading import Checkpoint, load_model
from keylayers.model.options import ModelOptions
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options
from keylayers.updates import dense_updates
from keylayers.updates.dense import take_other_weights

NUM_ROUNDS = 3
TOKENS, VOCABULARY = 64, 32_000
MIB = 1024**2


def run() -> dict[str, Any]:
    """Make the pair, measure both sides in turn, print the table."""
    peaks: dict[str, list[float]] = {"bare": [], "rank": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = make_pair(folder)
        for _ in range(NUM_ROUNDS):
            for side, found in peaks.items():
                found.append(measured(side, folder))
    medians = {side: statistics.median(found) for side, found in peaks.items()}
    extra = medians["rank"] - medians["bare"]
    largest = sizes["largest_module_mib"]
    print(f"checkpoint {sizes['checkpoint_mib']:.0f} MiB, {sizes['num_parameters']:,} parameters")
    for side, found in peaks.items():
        print(f"{side:<6}peak {medians[side]:.0f} MiB ({min(found):.0f} to {max(found):.0f})")
    print(
        f"ranking holds {extra:+.0f} MiB more than the bare pass: {extra / largest:.2f} of the "
        f"largest module ({largest:.0f} MiB); goal at most 1; a second model would be "
        f"{sizes['checkpoint_mib']:.0f}"
    )
    return {**sizes, "peak_mib": peaks, "extra_in_largest_modules": extra / largest}


def make_pair(folder: Path) -> dict[str, Any]:
    """A random base and a tuned checkpoint that differs from it everywhere."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=1280,
        intermediate_size=3456,
        num_hidden_layers=25,
        num_attention_heads=20,
        num_key_value_heads=20,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder / "tuned")
    sizes = [one.numel() * one.element_size() / MIB for one in model.parameters()]
    return {
        "num_parameters": sum(one.numel() for one in model.parameters()),
        "checkpoint_mib": sum(sizes),
        "largest_module_mib": max(sizes),
    }


def measured(side: str, folder: Path) -> float:
    """The peak that one side reports from a process of its own, in MiB."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.checkpoint_pair",
        side,
        str(folder),
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ})
    return float(done.stdout.splitlines()[-1])


def child(side: str, folder: Path) -> None:
    """Load the base, then do one side's work and print its peak memory."""
    model = load_model(ModelOptions(model=str(folder / "base"), dtype="float32"))
    tokens = torch.randint(0, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    reset_peak()
    if side == "bare":
        bare(model, tokens)
    else:
        rank(model, tokens, folder)
    print(peak_mib())


def bare(model: LlamaForCausalLM, tokens: torch.Tensor) -> None:
    """One forward and backward pass for activations through the frozen model."""
    trainer_of(model, tokens)  # so that both sides hold one
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(tokens).requires_grad_(True)
    model(inputs_embeds=embedded, labels=tokens).loss.backward()


def rank(model: LlamaForCausalLM, tokens: torch.Tensor, folder: Path) -> None:
    """Scores of all modules from one batch at two points, as `keylayers rank --tuned` does."""
    checkpoint = Checkpoint.open(ModelOptions(model=str(folder / "tuned")))
    updates = dense_updates(model, checkpoint)
    take_other_weights(model, checkpoint)
    options = scoring_options(method="path", mask_batches=1, path_points=2)
    score_modules(trainer_of(model, tokens), updates, options)


def trainer_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> Trainer:
    """A plain trainer of the one batch; its loader has been used once."""
    rows = tokens.tolist()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, per_device_train_batch_size=1, report_to="none", use_cpu=True
        )
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
    next(iter(trainer.get_train_dataloader()))
    return trainer


def reset_peak() -> None:
    """Let the kernel's peak of resident memory start again from what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The peak of resident memory since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("the kernel reports no peak of resident memory")


if __name__ == "__main__":
    child(sys.argv[1], Path(sys.argv[2]))
