# SPDX-License-Identifier: Apache-2.0
"""On an accelerator: peak memory and tokens per second of what is trained and of the mask step.

    python -m benchmarks.gpu --output FOLDER          # random Llama-2-7B and Llama-3.1-8B, bfloat16
    python -m benchmarks.gpu --output FOLDER --tiny   # the same on any machine, to try the script

One process a case, since memory that was held once is not given back; cases that do not fit are
recorded as such.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import is_bitsandbytes_available

from keylayers.apply.adapter import add_lora
from keylayers.apply.freeze import train_only
from keylayers.environment import environment
from keylayers.files import write_json
from keylayers.gates import gated
from keylayers.model.modules import map_modules
from keylayers.training.shallow import shallow_backward
from keylayers.updates import adapter_updates

SHAPES: dict[str, dict[str, int]] = {
    "llama-2-7b": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama-3.1-8b": {
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
WHAT = ("lora", "lora, checkpointed", "lora, 4 bits", "full", "mask", "bare")
FRACTIONS = (1.0, 0.75, 0.3, 0.2, 0.1)
RANK = 16
_HELD: list[Any] = []  # gates, for as long as the process lives


def cases(shapes: list[str], tokens: tuple[int, ...]) -> list[dict[str, Any]]:
    """Everything that is measured; a selection is the uppermost modules, or spread over all."""
    found = []
    for shape in shapes:
        for length in tokens:
            for what in WHAT:
                is_whole = what in ("mask", "bare")
                for fraction in FRACTIONS[:1] if is_whole else FRACTIONS:
                    for place in ("upper",) if fraction == 1 else ("upper", "spread"):
                        found.append(
                            {
                                "shape": shape,
                                "tokens": length,
                                "what": what,
                                "fraction": fraction,
                                "place": place,
                            }
                        )
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
    median = statistics.median(seconds[2:])  # the first two warm up
    is_cuda = device.type == "cuda"
    return {
        "tokens_per_second": case["tokens"] / median,
        "seconds": seconds[2:],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if is_cuda else None,
        "num_trained": sum(one.numel() for one in model.parameters() if one.requires_grad),
    }


def prepared(
    case: dict[str, Any], device: torch.device
) -> tuple[PreTrainedModel | PeftModel, Callable[[torch.Tensor], None]]:
    """The model of a case and one step of it."""
    base = _base(case, device)
    names = _chosen(base, case["fraction"], case["place"])
    if case["what"] == "full":
        train_only(base, names)
        return base, _training(base)
    model = add_lora(base, names, r=RANK, lora_alpha=2 * RANK)
    model.train()
    if case["what"] == "lora, checkpointed":
        model.enable_input_require_grads()
        base.activation_checkpointing_enable()
    if case["what"] in ("mask", "bare"):
        return model, _passing(model, is_gated=case["what"] == "mask")
    shallow_backward(model)
    return model, _training(model)


def _base(case: dict[str, Any], device: torch.device) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[case["shape"]], max_position_embeddings=4096)
    dtype = torch.bfloat16 if device.type != "cpu" else torch.float32
    torch.set_default_dtype(dtype)
    with device:
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if case["what"] == "lora, 4 bits":
        _pack(model, device)
    return model


def _pack(model: PreTrainedModel, device: torch.device) -> None:
    """NF4 in place of every linear layer of the blocks, one at a time."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for info in map_modules(model):
        parent, _, name = info.name.rpartition(".")
        layer = model.get_submodule(info.name)
        packed = Linear4bit(
            layer.in_features, layer.out_features, bias=False, compute_dtype=model.dtype
        )
        packed.weight = Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
        setattr(model.get_submodule(parent), name, packed.to(device))


def _chosen(model: PreTrainedModel, fraction: float, place: str) -> list[str]:
    names = [one.name for one in map_modules(model)]
    count = round(fraction * len(names))
    if place == "upper":
        return names[-count:]
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    taken = set(order[:count])
    return [name for index, name in enumerate(names) if index in taken]


def _training(model: PreTrainedModel | PeftModel) -> Callable[[torch.Tensor], None]:
    trained = [one for one in model.parameters() if one.requires_grad]
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

    if not is_gated:
        model.requires_grad_(False)
        return step
    gates = gated(model, adapter_updates(model), initial_score=2.0)
    gates.__enter__()
    _HELD.append(gates)
    return step


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize()


def main() -> None:
    """Run every case in a process of its own, and record what came."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["llama-2-7b", "llama-3.1-8b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measured(json.loads(arguments.case), arguments.steps)))
        return
    shapes, tokens = (["tiny"], [16]) if arguments.tiny else (arguments.shapes, arguments.tokens)
    rows = []
    for case in cases(shapes, tuple(tokens)):
        if case["what"] == "lora, 4 bits" and not is_bitsandbytes_available():
            continue
        rows.append(case | _in_own_process(case, arguments))
        write_json(arguments.output / "gpu.json", _record(rows))
        print(rows[-1], flush=True)


def _in_own_process(case: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu"]
    command += ["--output", str(arguments.output), "--steps", str(arguments.steps)]
    done = subprocess.run(
        [*command, "--case", json.dumps(case)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"failed": last[0]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _record(rows: list[dict[str, Any]]) -> dict[str, Any]:
    is_cuda = torch.cuda.is_available()
    card = torch.cuda.get_device_name() if is_cuda else None
    return {"environment": environment(), "card": card, "cases": rows}


if __name__ == "__main__":
    main()
