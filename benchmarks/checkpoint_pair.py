# SPDX-License-Identifier: Apache-2.0
"""Memory of ranking the difference of two checkpoints, against the base model's bare pass.

Each side runs in its own process on the same pair of random Llamas (half a billion parameters,
float32) and the same batch, and reports the peak of what it held after loading. Goal: ranking needs
no more than the bare pass and the largest module.
"""

import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from benchmarks.sides import last_line_of, random_llama
from keylayers.model.checkpoint import Checkpoint
from keylayers.model.loading import load_model
from keylayers.model.options import ModelOptions
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options
from keylayers.updates import dense_updates
from keylayers.updates.checkpoints import take_other_weights

NUM_ROUNDS = 3
TOKENS, VOCABULARY = 64, 32_000
MIB = 1024**2


def run() -> dict[str, Any]:
    """Make the pair, measure both sides in turn, print and return the record."""
    peaks: dict[str, list[float]] = {"bare": [], "rank": []}
    with tempfile.TemporaryDirectory() as name:
        sizes = make_pair(Path(name))
        for _ in range(NUM_ROUNDS):
            for side, found in peaks.items():
                found.append(float(last_line_of("-m", "benchmarks.checkpoint_pair", side, name)))
    extra = statistics.median(peaks["rank"]) - statistics.median(peaks["bare"])
    largest = sizes["largest_module_mib"]
    print(f"ranking holds {extra:+.0f} MiB more than the bare pass")
    print(f"that is x {extra / largest:.2f} of the largest module")
    return {**sizes, "peak_mib": peaks, "extra_in_largest_modules": extra / largest}


def make_pair(folder: Path) -> dict[str, Any]:
    """Write a random base and a tuned checkpoint that differs from it everywhere."""
    model = random_llama(1280, 25, VOCABULARY, intermediate_size=3456, tie_word_embeddings=True)
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder / "tuned")
    sizes = [parameter.nbytes / MIB for parameter in model.parameters()]
    return {
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "checkpoint_mib": sum(sizes),
        "largest_module_mib": max(sizes),
    }


def one_side(side: str, folder: Path) -> None:
    """Load the base, do one side's work, print the peak of resident memory in MiB."""
    model = load_model(ModelOptions(model=str(folder / "base"), dtype="float32"))
    tokens = torch.randint(0, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts again from here
    trainer = trainer_of(model, tokens)  # both sides hold one
    if side == "bare":
        model.requires_grad_(False)
        embedded = model.get_input_embeddings()(tokens).requires_grad_(True)
        model(inputs_embeds=embedded, labels=tokens).loss.backward()
    else:
        tuned = ModelOptions(model=str(folder / "tuned"))
        checkpoint = Checkpoint.open(tuned).named_as_in(model)
        updates = dense_updates(model, checkpoint)
        take_other_weights(model, checkpoint)
        options = scoring_options("path", mask_batches=1, path_points=2)
        score_modules(trainer, updates, options)
    status = Path("/proc/self/status").read_text()
    print(int(status.partition("VmHWM:")[2].split()[0]) / 1024)


def trainer_of(model: LlamaForCausalLM, tokens: torch.Tensor) -> Trainer:
    """A plain trainer of one batch; its loader has been used once."""
    rows = tokens.tolist()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, per_device_train_batch_size=1, report_to="none", use_cpu=True
        )
    dataset = Dataset.from_dict({"input_ids": rows, "labels": rows})
    trainer = Trainer(model=model, args=arguments, train_dataset=dataset)
    next(iter(trainer.get_train_dataloader()))
    return trainer


if __name__ == "__main__":
    one_side(sys.argv[1], Path(sys.argv[2]))
