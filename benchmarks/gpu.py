# SPDX-License-Identifier: Apache-2.0
"""On an accelerator: peak memory and tokens per second of training and of the mask step.

    python -m benchmarks.gpu --output FOLDER          # random Llama-2-7B and Llama-3.1-8B, bfloat16
    python -m benchmarks.gpu --output FOLDER --tiny   # on any machine, to try the script

One process per case, because an allocator keeps its peak. Cases that do not fit are recorded as
failed.
"""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from benchmarks.sides import last_line_of, random_llama, selected
from keylayers.apply.trainable import add_lora, train_only
from keylayers.environment import environment
from keylayers.files import write_json
from keylayers.gates import gated
from keylayers.model.modules import map_modules
from keylayers.training.shallow import shallow_backward
from keylayers.updates import adapter_updates

# width, blocks, vocabulary, width of the MLP, heads, key-value heads
SHAPES = {
    "llama-2-7b": (4096, 32, 32_000, 11_008, 32, 32),
    "llama-3.1-8b": (4096, 32, 128_256, 14_336, 32, 8),
    "tiny": (64, 4, 512, 128, 4, 2),
}
WHAT = ("lora", "lora, checkpointed", "lora, 4 bits", "full", "mask", "bare")
FRACTIONS = (1.0, 0.75, 0.3, 0.2, 0.1)
RANK = 16
_OPEN = ExitStack()  # gates, for as long as the process lives


def cases(shapes: list[str], tokens: list[int]) -> list[dict[str, Any]]:
    """Everything that is measured; a selection is the uppermost modules, or spread over all."""
    found = []
    for shape, length, what in product(shapes, tokens, WHAT):
        for fraction in FRACTIONS[:1] if what in ("mask", "bare") else FRACTIONS:
            for place in ("upper",) if fraction == 1 else ("upper", "spread"):
                case = {"shape": shape, "tokens": length, "what": what}
                found.append(case | {"fraction": fraction, "place": place})
    return found


def measured(case: dict[str, Any], num_steps: int) -> dict[str, Any]:
    """Tokens per second and peak memory of one case in this process."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model, one_step = prepared(case, device)
    rows = torch.randint(0, model.config.vocab_size, (1, case["tokens"]), device=device)
    seconds = []
    for _ in range(num_steps + 2):
        _wait(device)
        start = time.perf_counter()
        one_step(rows)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    is_cpu = device.type == "cpu"
    seconds = seconds[2:]  # after two to warm up
    return {
        "tokens_per_second": case["tokens"] / statistics.median(seconds),
        "seconds": seconds,
        "peak_gib": None if is_cpu else torch.accelerator.max_memory_allocated() / 2**30,
        "num_trained": sum(one.numel() for one in model.parameters() if one.requires_grad),
    }


def prepared(
    case: dict[str, Any], device: torch.device
) -> tuple[PreTrainedModel | PeftModel, Callable[[torch.Tensor], None]]:
    """The model of a case and one step of it."""
    base = _base(case, device)
    names = [info.name for info in map_modules(base)]
    names = selected(names, case["fraction"], case["place"])
    if case["what"] == "full":
        train_only(base, names)
        return base, _training(base)
    model = add_lora(base, names, r=RANK, lora_alpha=2 * RANK)
    model.train()
    if case["what"] in ("mask", "bare"):
        return model, _passing(model, is_gated=case["what"] == "mask")
    if case["what"] == "lora, checkpointed":
        model.enable_input_require_grads()
        base.activation_checkpointing_enable()
    shallow_backward(model)
    return model, _training(model)


def _base(case: dict[str, Any], device: torch.device) -> PreTrainedModel:
    width, blocks, vocabulary, mlp, heads, kv_heads = SHAPES[case["shape"]]
    torch.set_default_dtype(torch.float32 if device.type == "cpu" else torch.bfloat16)
    with device:
        model = random_llama(
            width, blocks, vocabulary, intermediate_size=mlp, num_attention_heads=heads,
            num_key_value_heads=kv_heads, max_position_embeddings=4096,
        )  # fmt: skip
    torch.set_default_dtype(torch.float32)
    if case["what"] == "lora, 4 bits":
        _quantize(model, device)
    return model


def _quantize(model: PreTrainedModel, device: torch.device) -> None:
    """NF4 in place of every linear layer of the blocks, one at a time."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for info in map_modules(model):
        weight = model.get_submodule(info.name).weight.data
        packed = Linear4bit(*weight.shape[::-1], bias=False, compute_dtype=model.dtype)
        packed.weight = Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4")
        model.set_submodule(info.name, packed.to(device))


def _training(model: PreTrainedModel | PeftModel) -> Callable[[torch.Tensor], None]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)

    def step(rows: torch.Tensor) -> None:
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _passing(model: PeftModel, *, is_gated: bool) -> Callable[[torch.Tensor], None]:
    """Forward and backward down to the first block's input, with gates or without."""

    def step(rows: torch.Tensor) -> None:
        embedded = model.get_input_embeddings()(rows).detach().requires_grad_(True)
        model(inputs_embeds=embedded, labels=rows).loss.backward()

    model.requires_grad_(False)
    if is_gated:
        _OPEN.enter_context(gated(model, adapter_updates(model), initial_score=2.0))
    return step


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def main() -> None:
    """Run every case in a process of its own and record the results as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["llama-2-7b", "llama-3.1-8b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measured(json.loads(given.case), given.steps)))
        return
    shapes, tokens = (["tiny"], [16]) if given.tiny else (given.shapes, given.tokens)
    given.output.mkdir(parents=True, exist_ok=True)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    record: dict[str, Any] = {"environment": environment(), "card": card, "cases": []}
    for case in cases(shapes, tokens):
        if case["what"] == "lora, 4 bits" and not is_bitsandbytes_available():
            continue
        words = ("--output", str(given.output), "--steps", str(given.steps))
        try:
            line = last_line_of("-m", "benchmarks.gpu", *words, "--case", json.dumps(case))
            found = json.loads(line)
        except subprocess.CalledProcessError as error:
            found = {"failed": (error.stderr.strip().splitlines() or [str(error)])[-1]}
        record["cases"].append(case | found)
        write_json(given.output / "gpu.json", record)
        print(record["cases"][-1], flush=True)


if __name__ == "__main__":
    main()
