# SPDX-License-Identifier: Apache-2.0
"""Two processes give what one gives, to float tolerance: DDP with gloo, as on any CPU.

A batch of two in each of two processes is a batch of four in one. Batches of the last, shorter kind
are avoided: there launchers repeat examples.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from test_objectives import file_for
from test_rank import keylayers

# 32 examples to train, 8 for the mask, 8 held out: whole batches of 2 and of 4
DATA = ("--data", "{data}")
SMALL = ("--lora-rank", 4, "--learning-rate", 0.02)
RANK = (*SMALL, "--held-out", 8, "--max-steps", 6)
METHODS = {
    "elimination": ("--mask-batches", 2),
    "ila": ("--mask-steps", 10),
    "shapley": ("--mask-batches", 2, "--permutations", 2),
    "leave-one-out": ("--mask-batches", 2),
    "path": ("--mask-batches", 2, "--path-points", 3),
}
LOOKS_INSIDE = ("fisher", "cka", "gradient-norm")  # every process sees every batch


# Name of the output -> the command; {data}, {pairs} and {ranking} stand for files.
COMMANDS = {
    **{name: ("rank", *DATA, *RANK, "--method", name, *more) for name, more in METHODS.items()},
    **{
        name: ("rank", *DATA, *RANK, "--method", name, "--mask-batches", 2) for name in LOOKS_INSIDE
    },
    "dpo": (
        *("rank", "--data", "{pairs}", "--objective", "dpo", *SMALL, "--held-out", 4),
        *("--max-steps", 4, "--mask-batches", 1),
    ),
    "full": ("rank", *DATA, *RANK, "--update", "full", "--mask-batches", 2),
    "train": (
        *("train", "--ranking", "{ranking}", "--budget", 0.3, "--controls", "random"),
        *("--gradient-accumulation", 2),
    ),
    "rank-first": (
        *("train", "--rank-first", *DATA, *SMALL, "--held-out", 8, "--steps", 8),
        *("--mask-batches", 2, "--controls", "last", "--save-steps", 2),
    ),
    "train-full": (
        *("train", "--ranking", "{ranking}", "--budget", 0.3, "--update", "full"),
        "--gradient-checkpointing",
    ),
}


def commands(tiny, preferences, root, batch_size):
    """The commands with their files, which write below `root`."""
    files = {"{data}": tiny / "data.jsonl", "{pairs}": file_for(preferences, "dpo")}
    files["{ranking}"] = root / "elimination"
    shared = ("--model", tiny / "model", "--batch-size", batch_size)
    return [
        [str(files.get(word, word)) for word in (*words, *shared, "--output", root / name)]
        for name, words in COMMANDS.items()
    ]


def launch(folder, commands):
    """Run the commands in two processes; their exit codes and what both printed."""
    words = folder / "commands.json"
    words.write_text(json.dumps(commands))
    script = Path(__file__).with_name("launched.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    launcher = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", "2", script, words],
        capture_output=True,
        text=True,
        env=environment,
    )
    codes = {}
    for line in done.stdout.splitlines():
        if line.startswith('{"'):
            codes |= json.loads(line)
    return codes, done.stdout, done.stderr


@pytest.fixture(scope="module")
def both(tiny, preferences, tmp_path_factory):
    """The results of one process and of two, and what the two printed."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    asked = commands(tiny, preferences, two, 2)
    codes, out, err = launch(two, asked)
    assert codes == {"0": [0] * len(asked), "1": [0] * len(asked)}, err[-3000:]
    for command in commands(tiny, preferences, one, 4):
        assert keylayers(*command) == 0
    return one, two, out, err


def scores(folder):
    modules = json.loads((folder / "ranking.json").read_text())["modules"]
    return torch.tensor([module["score"] for module in modules], dtype=torch.float64)


def close(first, second, tolerance):
    return bool((first - second).abs().max() <= tolerance * first.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, "dpo", "full"])
def test_the_ranking_of_two_processes_is_that_of_one(both, name):
    one, two, *_ = both
    assert close(scores(one / name), scores(two / name), 1e-4)
    records = [json.loads((root / name / "ranking.json").read_text()) for root in (one, two)]
    for part in ("held_out_loss_nats", "stage_1"):
        first, second = (record["provenance"][part] for record in records)
        if part == "stage_1":
            first, second = (dict(enumerate(each["losses"])) for each in (first, second))
        assert first == pytest.approx(second, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOKS_INSIDE)
def test_a_method_that_looks_inside_sees_every_batch_in_every_process(both, name):
    """So its batches are smaller than those of one process with batches of four, and as many."""
    one, two, *_ = both
    record = json.loads((two / name / "ranking.json").read_text())["provenance"]
    assert (
        record["mask"]["num_forward"]
        == json.loads((one / name / "ranking.json").read_text())["provenance"]["mask"][
            "num_forward"
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "rank-first", "train-full"])
def test_so_is_what_is_trained(both, name):
    one, two, *_ = both
    records = [json.loads((root / name / "keylayers.json").read_text()) for root in (one, two)]
    assert records[0]["selection"]["modules"] == records[1]["selection"]["modules"]
    assert records[0].get("frozen", {}).get("modules") == (
        records[1].get("frozen", {}).get("modules")
    )
    for first, second in zip(*(record["results"] for record in records), strict=True):
        assert first["label"] == second["label"]
        assert first["held_out_loss_nats"] == pytest.approx(second["held_out_loss_nats"], rel=1e-4)
    weights = "model.safetensors" if name == "train-full" else "adapter_model.safetensors"
    first, second = (load_file(root / name / weights) for root in (one, two))
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        torch.testing.assert_close(tensor.float(), second[key].float(), atol=2e-3, rtol=1e-3)


@pytest.mark.slow
def test_only_the_first_process_speaks_and_writes(both):
    _, two, out, err = both
    assert out.count(f"written to {two / 'elimination' / 'ranking.json'}") == 1
    of_six_steps = [words for words in COMMANDS.values() if set(RANK) <= set(words)]
    assert err.count("stage 1 ended after 6 steps") == len(of_six_steps)
    left = [path.name for path in two.rglob(".*")]
    assert left == []


@pytest.mark.slow
def test_a_mistake_ends_every_process_with_one_line(tiny, tmp_path):
    words = ["rank", "--model", str(tiny / "model"), "--data", str(tmp_path / "absent.jsonl")]
    codes, _, err = launch(tmp_path, [[*words, "--output", str(tmp_path / "out")]])
    assert codes == {"0": [2], "1": [2]}
    assert err.count("keylayers: ") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrapper", ["fsdp", "deepspeed"])
def test_a_model_that_is_spread_over_processes_is_refused(
    tiny, tmp_path, monkeypatch, capsys, wrapper
):
    """What their launchers make of a trainer is seen there, whatever the device."""
    from keylayers.runs import rank

    def spread(*arguments, **options):
        trainer = make(*arguments, **options)
        setattr(trainer, f"is_{wrapper}_enabled", True)
        return trainer

    make = rank.make_loss_trainer
    monkeypatch.setattr(rank, "make_loss_trainer", spread)
    words = ("--model", tiny / "model", "--data", tiny / "data.jsonl", "--max-steps", 1)
    assert keylayers("rank", *words, "--output", tmp_path / "out") == 2
    assert "must be scored with the whole model in each process" in capsys.readouterr().err


def test_a_cache_of_frozen_blocks_is_refused_in_several_processes(
    tiny, tmp_path, monkeypatch, capsys
):
    words = ("--model", tiny / "model", "--data", tiny / "data.jsonl")
    assert keylayers("rank", *words, *RANK, "--mask-batches", 1, "--output", tmp_path / "r") == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    train = ("train", "--ranking", tmp_path / "r", "--budget", 0.3, "--prefix-cache-gib", 1)
    assert keylayers(*train, "--output", tmp_path / "t") == 2
    assert "must be left out with several processes, got 2" in capsys.readouterr().err
