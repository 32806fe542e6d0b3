# SPDX-License-Identifier: Apache-2.0
"""`keylayers prune` on a tiny model, through the command line; what it writes anybody can load."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from commands import (
    PLAIN_PEFT,
    PLAIN_TRANSFORMERS,
    best,
    changed_weights,
    complaint_in,
    fresh_process,
    keylayers,
    listing,
    modules_in,
    plain_loss,
    printed,
    rank,
    read,
    record_of,
    verified_in,
    weights_in,
)
from keylayers.apply import prune as pruning
from keylayers.commands import run_prune
from keylayers.ranking.record import Pruned, Size
from keylayers.report.terminal import reading_of_pruning
from tiny_files import NUM_MODULES, tiny_tokenizer, write_partial_adapter

PREFIX = "base_model.model."
WEIGHTS = "adapter_model.safetensors"
Run = namedtuple("Run", "folder code out err")


@pytest.fixture
def prune(tmp_path):
    """`keylayers prune` into a folder of the test's own, with what it printed."""

    def run(ranking, *more):
        folder = tmp_path / "cut"
        return Run(folder, *printed("prune", "--ranking", ranking, "--output", folder, *more))

    return run


def row(run, label):
    """The cells of a row of the table."""
    line = next(line for line in run.out.splitlines() if line.startswith(label))
    return line.removeprefix(label).split()


def assert_same_bits(after, before):
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_the_adapter_of_stage_1_is_cut_to_the_best_modules(ranked, prune):
    cut, full = prune(ranked, "--budget", "0.3"), ranked / "adapter"
    kept = best(ranked, 6)
    assert set(fresh_process(PLAIN_PEFT, cut.folder)) == modules_in(cut.folder) == kept
    assert_same_bits(weights_in(cut.folder), weights_in(full))
    assert f"adapter written to {cut.folder}" in cut.out.replace("\n", "")
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (cut.folder / name).read_bytes() == (full / name).read_bytes()
    made = record_of(cut.folder)
    found = made["result"]
    assert set(made["selection"]["modules"]) == set(found["modules"]) == kept
    assert made["options"]["adapter"] == str(full)
    stage_1 = read(ranked)["provenance"]["stage_1"]
    assert made["adapter"]["weights_sha256"] == stage_1["adapter_sha256"]
    labels = {"base": "none (base model)", "full": "full adapter", "pruned": "pruned adapter"}
    for part, label in labels.items():
        assert row(cut, label)[-1] == f"{found[f'{part}_loss_nats']:.4f}"
    assert found["base_loss_nats"] > found["pruned_loss_nats"] > found["full_loss_nats"]
    for part, folder, count in (("full", full, 21), ("pruned", cut.folder, 6)):
        num_parameters = sum(value.numel() for value in weights_in(folder).values())
        num_bytes = (folder / WEIGHTS).stat().st_size
        size = {"num_modules": count, "num_parameters": num_parameters, "num_bytes": num_bytes}
        assert found[part] == size
        cells = [str(count), f"{num_parameters:,}", f"{num_bytes / 2**20:.2f}"]
        assert row(cut, f"{part} adapter")[:3] == cells


def test_a_budget_of_all_writes_the_same_adapter_and_says_so(ranked, prune):
    run = prune(ranked, "--budget", "1.0")
    assert run.code == 0
    assert "the budget keeps everything, so nothing is pruned" in run.err
    assert modules_in(run.folder) == best(ranked, NUM_MODULES)
    assert_same_bits(weights_in(run.folder), weights_in(ranked / "adapter"))


def test_an_adapter_that_is_given_wins_and_freeze_keeps_all_but_the_worst(tiny, ranked, prune):
    run = prune(ranked, "--freeze", "0.25", "--adapter", tiny / "adapter")
    assert run.code == 0
    assert "the update differs from the one that was ranked" in run.err
    assert modules_in(run.folder) == best(ranked, 16)
    assert_same_bits(weights_in(run.folder), weights_in(tiny / "adapter"))
    assert not (run.folder / "tokenizer.json").exists()  # the adapter's folder holds none


def test_the_automatic_budget_is_the_verified_one(ranked, ranking_copy, prune):
    run = prune(ranking_copy, "--budget", "auto")
    assert (run.code, run.out) == (2, "")
    assert "make it with `keylayers verify`" in complaint_in(run.err)
    fast = ("--points", "5", "--random-orders", "1", "--margin", "0.5")
    assert keylayers("verify", "--ranking", ranking_copy, *fast) == 0
    verified = verified_in(ranking_copy)
    run = prune(ranking_copy, "--budget", "auto")
    count = verified["recommendation"]["num_modules"]
    assert modules_in(run.folder) == best(ranked, count)
    at = verified["best_first"]["counts"].index(count)
    loss = record_of(run.folder)["result"]["pruned_loss_nats"]
    assert loss == pytest.approx(verified["best_first"]["losses"][at], rel=1e-5)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("embedding", ["embed_tokens", "model.embed_tokens"])
def test_the_update_of_an_embedding_is_a_module_like_others(tiny, tmp_path, prune, embedding):
    """PEFT saves the base's embedding too, but not when the target is a full name."""
    names = [f"model.layers.{block}.self_attn.q_proj" for block in range(3)]
    write_partial_adapter(tiny, tmp_path / "adapter", [*names, embedding])
    assert rank(tiny, tmp_path / "out", "--adapter", tmp_path / "adapter") == 0
    before = weights_in(tmp_path / "adapter")
    for budget in (1, 3):
        run = prune(tmp_path / "out", "--budget", budget)
        assert run.code == 0
        kept, after = best(tmp_path / "out", budget), weights_in(run.folder)
        assert set(fresh_process(PLAIN_PEFT, run.folder)) == kept
        assert after.keys() == {name for name in before if any(f".{m}." in name for m in kept)}
        assert_same_bits(after, before)


def test_a_checkpoint_carries_only_the_important_differences(tiny, ranked_full, prune, tmp_path):
    tuned = Path(shutil.copytree(tiny / "tuned", tmp_path / "tuned"))
    tiny_tokenizer().save_pretrained(tuned)
    run = prune(ranked_full, "--budget", "5", "--tuned", tuned)
    assert run.code == 0
    base, new = weights_in(tiny / "model"), weights_in(run.folder)
    pruned = {f"{name}.weight" for name in best(ranked_full, 21) - best(ranked_full, 5)}
    assert changed_weights(tuned, run.folder) == pruned
    assert {name for name in pruned if torch.equal(new[name], base[name])} == pruned
    written = {path.name for path in run.folder.iterdir()}
    assert written == {path.name for path in tuned.iterdir()} | {"keylayers.json", "README.md"}
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (run.folder / name).read_bytes() == (tuned / name).read_bytes()
    assert fresh_process(PLAIN_TRANSFORMERS, run.folder) == ["torch.bfloat16"]
    assert f"wrote {len(new)} tensors, 16 of them from the base" in run.err
    num_bytes = (tuned / "model.safetensors").stat().st_size
    assert record_of(run.folder)["result"]["pruned"]["num_bytes"] == num_bytes
    assert row(run, "pruned checkpoint")[0] == "5"


def test_the_losses_of_a_checkpoint_are_measured_on_what_was_written(tiny, ranked_full, prune):
    run = prune(ranked_full, "--budget", "1.0")
    found = record_of(run.folder)["result"]
    assert found["pruned_loss_nats"] == pytest.approx(found["full_loss_nats"], rel=1e-5)
    run = prune(ranked_full, "--budget", "3")  # tuned is the base plus noise: less is better
    found = record_of(run.folder)["result"]
    assert found["pruned_loss_nats"] < found["full_loss_nats"]
    difference = found["full_loss_nats"] - found["pruned_loss_nats"]
    line = f"the pruned checkpoint is better than the full one, by {difference:.4f} nats on the 5"
    assert line in run.out
    for key, folder in (("base", tiny / "model"), ("full", tiny / "tuned"), ("pruned", run.folder)):
        assert found[f"{key}_loss_nats"] == pytest.approx(plain_loss(tiny, folder), rel=1e-5)


# losses of base, full and pruned, kept of 10 modules, what is said
READINGS = [
    ((2.0, 1.0, 1.5), 4, ["is worse than the full one, by 0.5000 nats", "it keeps 50.0 % of what"]),
    ((2.0, 1.0, 0.9), 4, ["is better than the full one, by 0.1000 nats", "keeps 110.0 %"]),
    ((2.0, 1.0, 1.00001), 4, ["is as good as the full one on the 7", "keeps 100.0 %"]),
    ((2.0, 1.0, 1.0), 10, ["all 10 modules are kept", "keeps 100.0 %"]),
    ((1.0, 1.2, 1.1), 4, ["is better than the full one, by 0.1000", "does not lower the held-out"]),
]


@pytest.mark.parametrize(("losses", "kept", "said"), READINGS)
def test_it_says_plainly_what_is_better(losses, kept, said):
    size = Size(num_modules=10, num_parameters=1)
    parts = ("base", "full", "pruned")
    values = {f"{part}_loss_nats": loss for part, loss in zip(parts, losses, strict=True)}
    found = Pruned(modules=("x",) * kept, full=size, pruned=size, num_held_out=7, **values)
    lines = reading_of_pruning(found)
    assert len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines, strict=True))


def _a_weight_is_lost(folder):
    tensors = weights_in(folder)
    save_file(tensors | {next(iter(tensors)): torch.zeros(4, 32)}, folder / WEIGHTS)


def _a_target_too_many(folder):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = f"{config['target_modules']}|lm_head"
    path.write_text(json.dumps(config))
    name = f"{PREFIX}lm_head.lora_"
    more = {f"{name}A.weight": torch.zeros(4, 32)}
    more |= {f"{name}B.weight": torch.zeros(len(tiny_tokenizer()), 4)}
    save_file(weights_in(folder) | more, folder / WEIGHTS)


# what happens to the pruned adapter before it is loaded once more, exit code, what the line says
FAILURES = [
    (_a_weight_is_lost, 1, "its held-out loss is"),
    (_a_target_too_many, 1, "exactly the kept modules, but 1 differ, first lm_head"),
    (Mock(side_effect=KeyboardInterrupt), 130, "nothing is half written"),
]


@pytest.mark.parametrize(("damage", "code", "message"), FAILURES)
def test_an_adapter_that_fails_its_proof_leaves_the_earlier_one(
    ranked, prune, monkeypatch, damage, code, message
):
    earlier = prune(ranked, "--budget", "2")
    before = listing(earlier.folder.parent)
    prune_adapter = run_prune.prune_adapter

    def write_badly(adapter, folder, *more):
        source = prune_adapter(adapter, folder, *more)
        damage(folder)
        return source

    monkeypatch.setattr(run_prune, "prune_adapter", write_badly)
    run = prune(ranked, "--budget", "3")
    assert (run.code, run.out) == (code, "")
    assert message in run.err.splitlines()[-1]
    assert listing(earlier.folder.parent) == before


def test_a_checkpoint_that_fails_its_proof_is_not_written(ranked_full, prune, monkeypatch):
    overwrite = pruning._overwrite
    monkeypatch.setattr(pruning, "_overwrite", lambda path, values: overwrite(path, [*values][1:]))
    run = prune(ranked_full, "--budget", "3")
    assert (run.code, run.out) == (1, "")
    assert "must hold the kept weights as they were, but 1 tensors differ" in run.err
    assert list(run.folder.parent.iterdir()) == []
