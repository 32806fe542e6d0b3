# SPDX-License-Identifier: Apache-2.0
"""Budgets in GiB: real steps of a trainer are measured; the best modules that fit are chosen."""

from dataclasses import dataclass

import pytest
import torch

from commands import complaint, keylayers, read, record_of
from keylayers import measured_memory
from keylayers.training.memory import MOMENTS, _longest_batch, _stored_bytes, peak_bytes
from keylayers.training.shallow import shallow_backward
from trainers import build, lora

from rankings import ranking_of

MIB = 2**20


@dataclass
class Held:
    """A step that holds 100 bytes, and a number of bytes for each module."""

    each: int
    batch: str = "2 x 8 tokens"
    num_measured: int = 0

    def of(self, names):
        self.num_measured += 1
        return float(100 + self.each * len(names))


FITTING = [("0.00012MB", 2), ("0.000129MB", 2), ("0.00013MB", 3), ("1GiB", 5)]
REFUSED = [
    ("0GiB", None, "as memory must be above 0"),
    ("-1GiB", None, "as memory must be above 0"),
    ("manyGiB", None, "`budget` must be a fraction .* got 'manyGiB'"),
    ("nanGB", None, "as memory must be above 0"),
    ("12GiB", None, "needs a measured training step, so it is for `keylayers train`"),
    ("12G", None, "must be a fraction such as 0.3"),
    (2, Held(1), "`memory` must be left out with `budget` 2"),
    ("0.0001MiB", Held(1000), "a step of the best module, which .*2 x 8 tokens"),
]


@pytest.mark.parametrize(("budget", "num_modules"), FITTING)
def test_as_many_of_the_best_as_fit_are_found_by_bisection(budget, num_modules):
    memory, ranking = Held(10), ranking_of([4.0, -1.0, 5.0, None, 2.0, 3.0])
    selected = ranking.select(budget, memory)
    assert set(selected.names) == {module.name for module in ranking.ordered()[:num_modules]}
    assert memory.num_measured <= 3
    assert (selected.budget, selected.num_tied_out) == (budget, 0)


@pytest.mark.parametrize(("budget", "memory", "message"), REFUSED)
def test_memory_that_makes_no_sense_or_lacks_a_step_is_refused(budget, memory, message):
    with pytest.raises(ValueError, match=message):
        ranking_of([2.0, 1.0, 0.5, 0.2]).select(budget, memory)


def trainer_of(targets, kind="SFT", **options):
    """A trainer whose adapter is on the modules that `targets` matches."""
    peft = lora(kind, target_modules=targets)
    return build(kind, "config", is_trained=False, is_moved=False, peft=peft, **options)


SETS = [
    r"model\.layers\.\d\..*proj",
    r"model\.layers\.[12]\..*proj",
    r"model\.layers\.2\..*proj",
    r"model\.layers\.[02]\.self_attn\.q_proj",
    r"model\.layers\.\d\.mlp\.down_proj",
    r"model\.layers\.1\.self_attn\.o_proj",
]


def held_by_its_own_step(trainer):
    """Bytes of weights, AdamW's moments and the peak of a step, of a trainer of one selection."""
    model = trainer.model
    if trainer.args.activation_checkpointing:
        model.activation_checkpointing_enable()
    model.train()
    shallow_backward(model)
    batch = trainer._prepare_inputs(dict(_longest_batch(trainer)))
    taken = peak_bytes(model.device, lambda: trainer.compute_loss(model, batch).backward())
    trained = sum(weight.nbytes for weight in model.parameters() if weight.requires_grad)
    return _stored_bytes(trainer, set()) + MOMENTS * trained + taken


@pytest.mark.parametrize(
    ("kind", "is_checkpointed"), [("SFT", False), ("SFT", True), ("DPO", False), ("ORPO", False)]
)
def test_what_a_set_holds_is_what_its_own_trainer_holds(kind, is_checkpointed):
    options = {"activation_checkpointing": is_checkpointed}
    whole = trainer_of(SETS[0], kind, **options)
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    memory = measured_memory(whole)
    for targets in SETS:
        alone = trainer_of(targets, kind, **options)
        own = held_by_its_own_step(alone)
        assert own * 0.99 < memory.of(alone.model.targeted_module_names) < own * 1.02
    assert all(torch.equal(value, before[name]) for name, value in whole.model.state_dict().items())
    assert all(weight.grad is None for weight in whole.model.parameters())


def test_more_modules_hold_more_and_what_cannot_be_measured_is_refused():
    trainer = trainer_of(SETS[0])
    memory = measured_memory(trainer)
    names = list(trainer.model.targeted_module_names)
    held = [memory.of(names[-count:]) for count in (1, 7, 14, len(names))]
    assert held == sorted(held)
    for wrong, what in ((["nothing"], "nothing"), ([], "none")):
        with pytest.raises(ValueError, match=f"modules that the trainer trains, got {what}"):
            memory.of(wrong)
    with pytest.raises(ValueError, match="GRPOTrainer samples its own"):
        measured_memory(build("GRPO", "model", is_trained=False, is_moved=False))


@pytest.mark.parametrize("update", ["lora", "full"])
def test_training_within_memory(ranked, tmp_path, capsys, update):
    common = ["--ranking", ranked, "--steps", "2", "--update", update]
    assert keylayers("train", *common, "--budget", "1GiB", "--output", tmp_path / "a") == 0
    assert "modules holds" in " ".join(capsys.readouterr().err.split())
    record = record_of(tmp_path / "a")
    modules = read(ranked)["modules"]
    assert record["selection"]["modules"] == [module["name"] for module in modules]
    budget = f"{record['step_memory_bytes'] / MIB - 0.1:.3f}MiB"
    assert keylayers("train", *common, "--budget", budget, "--output", tmp_path / "b") == 0
    held = record_of(tmp_path / "b")["step_memory_bytes"]
    assert held <= float(budget.removesuffix("MiB")) * MIB < record["step_memory_bytes"]
    assert keylayers("train", *common, "--budget", "0.01MiB", "--output", tmp_path / "c") == 2
    assert "must allow a step of the best module" in complaint(capsys)
    assert not (tmp_path / "c").exists()
