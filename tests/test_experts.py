# SPDX-License-Identifier: Apache-2.0
"""A mixture of experts on the command line, from ranking to a pruned adapter in plain PEFT."""

import json

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from architectures import sized
from commands import fresh_process
from tiny_files import rows, tiny_tokenizer

STACKED = ("gate_up_proj", "down_proj")
PLAIN_PEFT = """
import sys
from peft import AutoPeftModelForCausalLM
from peft.tuners.lora.layer import ParamWrapper
model = AutoPeftModelForCausalLM.from_pretrained(sys.argv[1])
found = [one.parameter_name for one in model.modules() if isinstance(one, ParamWrapper)]
print(*sorted(found))
"""


def keylayers(*arguments):
    from keylayers.cli import main

    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A tiny Mixtral as files, with data."""
    folder = tmp_path_factory.mktemp("mixture")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = sized(hf.MixtralConfig, num_local_experts=4, vocab_size=len(tokenizer))()
    hf.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    return folder


@pytest.fixture(scope="module")
def ranked(mixture, tmp_path_factory):
    output = tmp_path_factory.mktemp("ranked")
    options = ("--model", mixture / "model", "--data", mixture / "data.jsonl", "--output", output)
    quick = ("--max-steps", 8, "--mask-batches", 2, "--batch-size", 4, "--lora-rank", 4)
    assert keylayers("rank", *options, *quick, "--learning-rate", "0.02") == 0
    return output


def modules(ranked):
    return json.loads((ranked / "ranking.json").read_text())["modules"]


def test_stacked_experts_are_modules_with_scores_of_their_own(ranked):
    stacked = [one for one in modules(ranked) if one["is_stacked"]]
    assert [one["projection"] for one in stacked] == [*STACKED, *STACKED]
    assert len({one["score"] for one in modules(ranked)}) == 12


@pytest.mark.parametrize("budget", [1, 5, 11])
def test_an_adapter_on_experts_is_cut_to_the_best_modules(ranked, budget, tmp_path):
    """`prune` proves that the loss is that of the whole update with the other gates closed."""
    output = tmp_path / "cut"
    cut = ("prune", "--ranking", ranked, "--budget", budget, "--output", output)
    assert keylayers(*cut) == 0
    kept = {one["name"] for one in modules(ranked) if one["rank"] <= budget}
    found = json.loads((output / "keylayers.json").read_text())["result"]
    assert set(found["modules"]) == kept
    experts = sorted(name.rpartition(".")[2] for name in kept if ".experts." in name)
    assert fresh_process(PLAIN_PEFT, output) == experts
    weights = load_file(output / "adapter_model.safetensors")
    assert len(weights) == 2 * budget
    sizes = {one["name"]: one for one in modules(ranked)}
    assert all(sizes[name]["is_stacked"] == (".experts." in name) for name in kept)
