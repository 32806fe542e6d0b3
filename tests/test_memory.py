# SPDX-License-Identifier: Apache-2.0
"""Budgets in GiB: added up by hand, the best set by trying all, and steps that are measured."""

import json
from itertools import combinations

import pytest
import torch

from commands import complaint, keylayers
from trainers import build

from rankings import ranking_of

MIB = 2**20


def memory_of(states, kept, storages, **options):
    """Modules named as `ranking_of` does, met in that order."""
    from keylayers.ranking.memory import KeptStorage, ModuleMemory, StepMemory

    names = [one.name for one in ranking_of([1.0] * len(states)).modules]
    return StepMemory(
        **{
            "fixed_bytes": 100,
            "working_bytes": 10,
            "modules": {
                name: ModuleMemory(order, state, tuple(places))
                for order, (name, state, places) in enumerate(zip(names, states, kept, strict=True))
            },
            "storages": tuple(KeptStorage(*one) for one in storages),
            "block_input_bytes": None,
            "block_bytes": 0,
            "num_rows": 2,
            "num_tokens": 8,
        }
        | options
    )


# Two blocks of two modules. Storage 0 is the input that the first block's modules share, storage 2
# is kept whatever is trained below the last module, storage 4 lies outside the blocks.
STATES = [1, 2, 3, 4]
KEPT = [[0], [0, 1], [2], [3]]
STORAGES = [(16, 0, -1), (32, 0, -1), (64, 1, 2), (128, 1, -1), (256, None, 3)]


@pytest.mark.parametrize(
    ("places", "num_bytes"),
    [
        ([3], 110 + 4 + 128 + 256),
        ([2], 110 + 3 + 64 + 256),
        ([0], 110 + 1 + 16 + 64 + 256),
        ([0, 1], 110 + 1 + 2 + 16 + 32 + 64 + 256),
        ([1, 3], 110 + 2 + 4 + 16 + 32 + 64 + 128 + 256),
    ],
)
def test_a_step_is_added_up_from_what_each_set_keeps(places, num_bytes):
    memory = memory_of(STATES, KEPT, STORAGES)
    names = list(memory.modules)
    assert memory.of([names[place] for place in places]) == num_bytes


def test_with_checkpointing_the_inputs_of_blocks_and_one_block_are_kept():
    memory = memory_of(STATES, KEPT, STORAGES, block_input_bytes=1000, block_bytes=50)
    names = list(memory.modules)
    assert memory.of(names[3:]) == 110 + 4 + 1000 + 128 + 256
    assert memory.of(names[2:3]) == 110 + 3 + 1000 + 64 + 256
    assert memory.of(names[:1]) == 110 + 1 + 2000 + 64 + 256
    larger = memory_of(STATES, KEPT, STORAGES, block_input_bytes=1000, block_bytes=500)
    assert larger.of(names[3:]) == 110 + 4 + 1000 + 500 + 256


@pytest.mark.parametrize("budget", ["0.0006MB", "0.0007MB", "0.0009MB", "0.001MB", "0.002MB"])
@pytest.mark.parametrize("checkpointing", [{}, {"block_input_bytes": 100, "block_bytes": 20}])
def test_the_best_set_that_fits_is_that_of_trying_all(budget, checkpointing):
    scores = [4.0, 1.0, -1.0, 2.0, 3.0, 0.5]
    ranking = ranking_of(scores)
    storages = [(50, place // 2, -1) for place in range(6)]
    storages += [(40, place // 2, place) for place in range(6)]
    kept = [[place] for place in range(6)]
    memory = memory_of([70] * 6, kept, storages, **checkpointing)
    names = [one.name for one in ranking.modules]
    limit = float(budget.removesuffix("MB")) * 1e6
    worth = dict(zip(names, scores, strict=True))
    fitting = [
        one
        for count in range(1, 7)
        for one in combinations(names, count)
        if memory.of(one) <= limit
    ]
    best = max(sum(worth[name] for name in one) for one in fitting)
    selected = ranking.select(budget, memory)
    assert memory.of(selected.names) <= limit
    assert sum(worth[name] for name in selected.names) == pytest.approx(best)
    assert selected.budget == budget


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("0GiB", "as memory must be above 0"),
        ("-1GiB", "as memory must be above 0"),
        ("manyGiB", "`budget` must be a fraction .* got 'manyGiB'"),
        ("nanGB", "as memory must be above 0"),
        ("12GiB", r"needs a measured training step: use it with `keylayers train`"),
        ("12G", "must be a fraction such as 0.3"),
    ],
)
def test_memory_without_sense_or_without_a_step_is_refused(written, message):
    from keylayers.errors import ConfigError

    with pytest.raises(ConfigError, match=message):
        ranking_of([2.0, 1.0]).select(written)


def test_a_step_is_refused_where_it_has_no_effect_or_is_of_another_model():
    from keylayers.errors import ConfigError, RankingError

    memory = memory_of(STATES, KEPT, STORAGES)
    with pytest.raises(ConfigError, match="`memory` must be left out with `budget` 2"):
        ranking_of([1.0] * 4).select(2, memory)
    with pytest.raises(RankingError, match="a step that trains every ranked module"):
        ranking_of([1.0] * 6).select("1GiB", memory)
    with pytest.raises(RankingError, match="of the step that was measured, got none"):
        memory.of([])
    with pytest.raises(ConfigError, match=r"a step of one module, which is .*2 x 8 tokens"):
        ranking_of([1.0] * 4).select("0.0001MiB", memory)


def trainer_of(targets, kind="SFT", **options):
    """One whose adapter is on the modules that `targets` matches."""
    from peft import LoraConfig

    options.setdefault("activation_checkpointing", False)  # TRL's default is True
    peft = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    return build(kind, "config", is_trained=False, is_moved=False, peft=peft, **options)


def kept_by_a_step(trainer):
    """Bytes of distinct storage that a step's graph holds on to, as torch shows them."""
    from keylayers.training.memory import _longest_batch
    from keylayers.training.shallow import shallow_backward

    model = trainer.model
    model.train()
    shallow_backward(model)
    own = {one.untyped_storage().data_ptr() for one in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = trainer.compute_loss(model, trainer._prepare_inputs(_longest_batch(trainer)))
    assert loss.requires_grad
    return sum(kept.values())


SETS = [
    r"model\.layers\.\d\..*proj",
    r"model\.layers\.[12]\..*proj",
    r"model\.layers\.2\..*proj",
    r"model\.layers\.[02]\.self_attn\.q_proj",
    r"model\.layers\.\d\.mlp\.down_proj",
    r"model\.layers\.1\.self_attn\.o_proj",
]


@pytest.mark.parametrize("kind", ["SFT", "DPO", "ORPO"])
def test_what_a_set_keeps_is_what_its_own_step_keeps(kind):
    """Never less; more by what the lowest block keeps beside a frozen branch."""
    import keylayers

    whole = trainer_of(SETS[0], kind)
    before = {name: one.clone() for name, one in whole.model.state_dict().items()}
    memory = keylayers.measured_memory(whole)
    assert all(torch.equal(one, before[name]) for name, one in whole.model.state_dict().items())
    assert all(one.grad is None for one in whole.model.parameters())
    largest = 0.0
    for targets in SETS:
        alone = trainer_of(targets, kind)
        names = alone.model.targeted_module_names
        bill = memory.bill(names)
        states = sum(memory.modules[name].state_bytes for name in names)
        kept = bill.total - memory.fixed_bytes - memory.working_bytes - states
        own = kept_by_a_step(alone)
        assert kept >= own
        largest = max(largest, kept / own)
        trained = sum(one.numel() for one in alone.model.parameters() if one.requires_grad)
        assert states == 4 * 4 * trained  # float32 values, gradient, two moments
    assert largest < 1.05


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_peak_is_foreseen(is_checkpointed):
    from keylayers.training.memory import measured_memory, peak_of_step

    options = {"activation_checkpointing": is_checkpointed}
    memory = measured_memory(trainer_of(SETS[0], **options))
    for targets in SETS[1:]:
        alone = trainer_of(targets, **options)
        held = peak_of_step(alone) - memory.fixed_bytes
        foreseen = memory.of(alone.model.targeted_module_names) - memory.fixed_bytes
        assert held * 0.97 < foreseen < held * 1.1


def test_a_trainer_that_samples_is_refused():
    from keylayers.errors import ConfigError
    from keylayers.training.memory import measured_memory

    with pytest.raises(ConfigError, match="GRPOTrainer samples its own"):
        measured_memory(build("GRPO", "model", is_trained=False, is_moved=False))


@pytest.mark.parametrize("update", ["lora", "full"])
def test_training_within_memory(ranked, tmp_path, capsys, update):
    common = ["--ranking", ranked, "--steps", "2", "--update", update]
    assert keylayers("train", *common, "--budget", "1GiB", "--output", tmp_path / "a") == 0
    assert "GiB, one of all" in " ".join(capsys.readouterr().err.split())
    record = json.loads((tmp_path / "a" / "keylayers.json").read_text())
    scores = json.loads((ranked / "ranking.json").read_text())["modules"]
    positive = [one["name"] for one in scores if one["score"] > 0]
    assert record["selection"]["modules"] == positive
    budget = f"{record['step_memory_bytes'] / MIB - 0.1:.3f}MiB"
    assert keylayers("train", *common, "--budget", budget, "--output", tmp_path / "b") == 0
    less = json.loads((tmp_path / "b" / "keylayers.json").read_text())
    assert less["step_memory_bytes"] <= float(budget.removesuffix("MiB")) * MIB
    assert less["step_memory_bytes"] < record["step_memory_bytes"]


def test_too_little_memory_leaves_nothing(ranked, tmp_path, capsys):
    options = ("--ranking", ranked, "--budget", "0.01MiB", "--output", tmp_path / "t")
    assert keylayers("train", *options) == 2
    assert "must allow a step of one module" in complaint(capsys)
    assert not (tmp_path / "t").exists()
