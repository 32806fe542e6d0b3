# SPDX-License-Identifier: Apache-2.0
"""Two processes give what one gives, to float tolerance: gloo on a CPU under each wrapper.

A batch of two in each of two processes is a batch of four in one. Batches of the last, shorter kind
are avoided: there launchers repeat examples.
"""

import json
import subprocess
from collections import ChainMap
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from transformers import Trainer

import preloaded
from commands import file_for, keylayers, rank, read, record_of, weights_in, with_path
from keylayers.errors import ConfigError
from keylayers.model.sharding import check_can_freeze_inside, place_model
from keylayers.training.run import fine_tune
from outputs import contents, differences

from tiny_models import tiny_llama

# 32 examples to train, 8 for the mask, 8 held out: whole batches of 2 and of 4
SMALL = "--lora-rank 4 --learning-rate 0.02"
SFT = f"--data DATA {SMALL} --held-out 8"
RANK = f"rank {SFT} --max-steps 6"
BATCHES = "--mask-batches 2"
METHODS = {
    "elimination": BATCHES,
    "ila": "--mask-steps 10",
    "shapley": f"{BATCHES} --permutations 2",
    "leave-one-out": BATCHES,
    "path": f"{BATCHES} --path-points 3",
    "update-norm": "",
}
LOOKS_INSIDE = {  # every process sees every batch
    "fisher": "--method fisher",
    "cka": "--method cka",
    "gradient-norm": "--method gradient-norm",
    "parts": "--method fisher-pruning --granularity part",
}
TRAIN = "train --ranking RANKING --budget 0.3"
# Name of the output -> the command; DATA, PAIRS and RANKING stand for files.
COMMANDS = {
    **{name: f"{RANK} --method {name} {more}" for name, more in METHODS.items()},
    **{name: f"{RANK} {method} {BATCHES}" for name, method in LOOKS_INSIDE.items()},
    "dpo": f"rank --data PAIRS --objective dpo {SMALL} --held-out 4 --max-steps 4 --mask-batches 1",
    "full": f"{RANK} --update full {BATCHES}",
    "dora": f"{RANK} --update dora {BATCHES}",
    "stable": f"{RANK} --method update-norm --window 3 --epsilon 100 --warmup-steps 0",
    "train": f"{TRAIN} --controls random --gradient-accumulation 2",
    "rank-first": f"train --rank-first {SFT} --steps 8 {BATCHES} --controls last --save-steps 2",
    "train-full": f"{TRAIN} --update full --gradient-checkpointing",
}


def commands(tiny, preferences, root, batch_size):
    """Name -> the words of the command, which writes below `root`."""
    files = {"DATA": tiny / "data.jsonl", "PAIRS": file_for(preferences, "dpo")}
    files["RANKING"] = root / "elimination"
    shared = ("--model", tiny / "model", "--batch-size", batch_size, "--output")
    return {
        name: [str(files.get(word, word)) for word in (*words.split(), *shared, root / name)]
        for name, words in COMMANDS.items()
    }


# Wrapper -> what `accelerate launch` puts into the environment for it.
WRAPPERS = {
    "ddp": {},
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    },
    "zero2": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
        "ACCELERATE_GRADIENT_CLIPPING": "1.0",
        "DS_ACCELERATOR": "cpu",
    },
}
SPREAD = ("elimination", "update-norm", "dpo", "full", "stable", "train", "train-full")
RUN_UNDER = {"ddp": tuple(COMMANDS), "fsdp2": (*SPREAD, "dora", "rank-first"), "zero2": SPREAD}
NEEDS_DEEPSPEED = "DeepSpeed is not installed: `DS_BUILD_OPS=0 pip install deepspeed` (docs)"


def launch(folder, commands, wrapper="ddp", **environment):
    """Run the commands in two processes; their exit codes and what both printed."""
    words = folder / "commands.json"
    words.write_text(json.dumps(commands))
    script = Path(__file__).with_name("launched.py")
    # with PYTHON_EXEC torchrun starts its processes
    environment = with_path(PYTHON_EXEC=preloaded.python(), **WRAPPERS[wrapper], **environment)
    launcher = [preloaded.python(), "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", script, words],
        capture_output=True,
        text=True,
        env=environment,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
    return dict(ChainMap(*lines)), done.stdout, done.stderr


@pytest.fixture
def one(once, tiny, preferences):
    """The results of one process."""

    def write(root):
        for command in commands(tiny, preferences, root, 4).values():
            assert keylayers(*command) == 0

    return once("one-process", write)


@pytest.fixture
def two(request, once, tiny, preferences):
    """The results of two processes under a wrapper, and what they printed."""
    wrapper = request.param
    if wrapper == "zero2" and find_spec("deepspeed") is None:
        pytest.skip(NEEDS_DEEPSPEED)

    def write(root):
        asked = commands(tiny, preferences, root, 2)
        asked = [asked[name] for name in RUN_UNDER[wrapper]]
        codes, *printed = launch(root, asked, wrapper)
        assert codes == {"0": [0] * len(asked), "1": [0] * len(asked)}, printed[1][-3000:]
        (root / "printed.json").write_text(json.dumps(printed))

    root = once(f"two-processes-{wrapper}", write)
    out, err = json.loads((root / "printed.json").read_text())
    return SimpleNamespace(root=root, out=out, err=err, wrapper=wrapper)


def under_each_wrapper(*names):
    """A long test of these commands under each wrapper that they are run under."""
    cases = [
        pytest.param(wrapper, name, marks=pytest.mark.long)
        for wrapper in WRAPPERS
        for name in names
        if name in RUN_UNDER[wrapper]
    ]
    return pytest.mark.parametrize(("two", "name"), cases, indirect=["two"])


def scores(folder):
    return torch.tensor([module["score"] for module in read(folder)["modules"]]).double()


def difference(first, second):
    """The largest, as a part of the largest score of the first."""
    return float((first - second).abs().max() / first.abs().max())


@under_each_wrapper(*METHODS, "dpo", "full", "dora", "stable")
def test_the_ranking_of_two_processes_is_that_of_one(one, two, name):
    found = two.root / name
    assert difference(scores(one / name), scores(found)) < 1e-4
    first, second = (read(root)["provenance"] for root in (one / name, found))
    assert first["held_out_loss_nats"] == pytest.approx(second["held_out_loss_nats"], rel=1e-4)
    first, second = first["stage_1"], second["stage_1"]
    assert first["losses"] == pytest.approx(second["losses"], rel=1e-4)
    seen, others = (found["stability"]["measurements"] for found in (first, second))
    assert len(seen) == len(others) == (2 if name == "stable" else 0)
    for measured, other in zip(seen, others, strict=True):  # the first has no improvement
        known = {key: value for key, value in other.items() if value is not None}
        assert {key: measured[key] for key in known} == pytest.approx(known, rel=1e-4, abs=1e-3)
    if two.wrapper != "zero2":  # which hides gradients
        assert first["step_scores"] == pytest.approx(second["step_scores"], rel=1e-3, abs=1e-6)


@under_each_wrapper(*LOOKS_INSIDE)
def test_a_method_that_looks_inside_sees_every_batch_in_every_process(
    tiny, one, two, tmp_path, name
):
    """So it gives what one process gives with the batch of one of them, not of both."""
    found = two.root / name
    adapter = ("--adapter", found / "adapter", *LOOKS_INSIDE[name].split(), *BATCHES.split())
    inputs = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--held-out", 8)
    output = ("--batch-size", 2, "--output", tmp_path / "small")
    assert keylayers("rank", *inputs, *adapter, *output) == 0
    assert difference(scores(tmp_path / "small"), scores(found)) < 1e-4
    assert difference(scores(one / name), scores(found)) > 1e-4


@under_each_wrapper("train", "rank-first", "train-full")
def test_so_is_what_is_trained(one, two, name):
    found = two.root / name
    first, second = (record_of(root) for root in (one / name, found))
    assert first["selection"]["modules"] == second["selection"]["modules"]
    assert first.get("frozen", {}).get("modules") == second.get("frozen", {}).get("modules")
    for row, other in zip(first["results"], second["results"], strict=True):
        assert row["label"] == other["label"]
        assert row["held_out_loss_nats"] == pytest.approx(other["held_out_loss_nats"], rel=1e-4)
    first, second = (weights_in(root) for root in (one / name, found))
    torch.testing.assert_close(first, second, atol=2e-3, rtol=1e-3, check_dtype=False)


@pytest.mark.long
@pytest.mark.parametrize("two", WRAPPERS, indirect=True)
def test_only_the_first_process_speaks_and_writes(two):
    assert two.out.count(f"written to {two.root / 'elimination' / 'ranking.json'}") == 1
    of_six_steps = [name for name in RUN_UNDER[two.wrapper] if COMMANDS[name].startswith(RANK)]
    assert two.err.count("stage 1 ended after 6 steps") == len(of_six_steps)
    assert [path.name for path in two.root.rglob(".*")] == []


@under_each_wrapper("rank-first")
def test_a_stopped_run_of_two_processes_goes_on_bit_for_bit(tiny, preferences, two, tmp_path, name):
    words = commands(tiny, preferences, tmp_path, 2)[name]
    for more in ({"STOP_AT": "5"}, {}):
        codes, _, err = launch(tmp_path, [words], two.wrapper, **more)
        assert codes == {rank: [130 if more else 0] for rank in "01"}, err[-3000:]
    assert "training selected: continues after step 4" in err
    assert differences(contents(two.root / name), contents(tmp_path / name)) == []


@pytest.mark.long
def test_a_mistake_ends_every_process_with_one_line(tiny, tmp_path):
    words = ["rank", "--model", str(tiny / "model"), "--data", str(tmp_path / "absent.jsonl")]
    codes, _, err = launch(tmp_path, [[*words, "--output", str(tmp_path / "out")]])
    assert codes == {"0": [2], "1": [2]}
    assert err.count("keylayers: ") == 1
    assert not (tmp_path / "out").exists()


FSDP2 = {"fsdp_version": 2}
CHECKPOINTED = {"activation_checkpointing": True, **FSDP2}
# What is asked of a trainer, its wrapper and the wrapper's settings, what is said.
REFUSED = [
    (place_model, "fsdp", {"fsdp_version": 1}, "FSDP must be of version 2, got 1"),
    (place_model, "fsdp", CHECKPOINTED, "`fsdp_activation_checkpointing` must be false"),
    (fine_tune, "fsdp", FSDP2, "`update` must be another than adalora under FSDP"),
    (place_model, "deepspeed", {"zero_stage": 3}, "must be stage 0, 1 or 2, got 3"),
    (check_can_freeze_inside, "deepspeed", {"zero_stage": 2}, "holds all weights as one"),
]


@pytest.mark.parametrize(("ask", "wrapper", "plugin", "message"), REFUSED)
def test_what_a_wrapper_cannot_do_is_refused(ask, wrapper, plugin, message):
    trainer = Trainer.__new__(Trainer)  # as on accelerators, where it would be whole
    trainer.model = get_peft_model(tiny_llama(), AdaLoraConfig(total_step=2, target_r=8))
    trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled = wrapper == "fsdp", wrapper != "fsdp"
    state = SimpleNamespace(**{f"{wrapper}_plugin": SimpleNamespace(**plugin)})
    trainer.accelerator = SimpleNamespace(state=state)
    with pytest.raises(ConfigError, match=message):
        ask(trainer)


def test_a_wrapper_that_is_left_out_on_a_cpu_is_not_left_out_in_silence(
    tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert rank(tiny, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "FSDP needs accelerators, but accelerate ignores it" in err
    assert "step 1" not in err
