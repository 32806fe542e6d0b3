# SPDX-License-Identifier: Apache-2.0
"""Frozen blocks are computed once: the same training, less work, nothing left behind."""

import json
import tempfile

import pytest
import torch
from transformers import TrainerCallback

from commands import complaint, keylayers, rank
from tiny_files import NUM_BLOCKS
from trainers import build

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
UPPER = r"model\.layers\.2\..*proj"
STEPS = 5  # of 8 examples, 4 at a time: the first two see them for the first time
SMALL = 0.001


class Counted(TrainerCallback):
    """How often each block is really computed; how large a file was open."""

    def __init__(self):
        self.counts = [0] * NUM_BLOCKS

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        def count(index):
            def hook(*_):
                self.counts[index] += 1

            return hook

        self.handles = [
            block.self_attn.register_forward_hook(count(index))
            for index, block in enumerate(model.get_base_model().model.layers)
        ]

    def on_train_end(self, args, state, control, **kwargs):
        for handle in self.handles:
            handle.remove()


def trained(kind="SFT", cache=None, targets=UPPER, callbacks=(), **options):
    from peft import LoraConfig

    options = {"activation_checkpointing": False, "max_steps": STEPS} | options
    peft = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    trainer = build(kind, "config", is_trained=False, is_moved=False, peft=peft, **options)
    counted = Counted()
    for callback in (counted, *callbacks, *([] if cache is None else [cache])):
        trainer.add_callback(callback)
    trainer.train()
    weights = {
        name: value.detach().clone()
        for name, value in trainer.model.named_parameters()
        if "lora_" in name
    }
    return trainer, weights, counted.counts


def differs_by(weights, others):
    assert weights.keys() == others.keys()
    assert any(bool(value.any()) for name, value in weights.items() if "lora_B" in name)
    return max(float((value - others[name]).abs().max()) for name, value in weights.items())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["SFT", "DPO", "ORPO"])
def test_the_training_is_the_same_and_later_epochs_skip_the_frozen_blocks(
    kind, checkpointing, tmp_path
):
    import keylayers

    options = {"activation_checkpointing": checkpointing}
    _, plain, _ = trained(kind, **options)
    _, _, every = trained(kind)
    cache = keylayers.PrefixCache(SMALL, tmp_path)
    trainer, weights, counts = trained(kind, cache, **options)
    assert differs_by(weights, plain) < 1e-5
    passes = every[0] // STEPS  # a step may run the model twice, for a reference
    assert (cache.num_blocks, cache.num_computed) == (2, 2)
    assert cache.num_read == STEPS * passes - 2
    assert counts[0] == counts[1] == 3  # the first batch that is read is computed too
    assert counts[2] >= every[2]
    assert list(tmp_path.iterdir()) == []
    blocks = trainer.model.get_base_model().model.layers
    assert all("forward" not in vars(block) for block in blocks)
    assert not trainer.model.get_base_model().model._forward_pre_hooks


def test_examples_beyond_the_room_are_computed(tmp_path):
    import keylayers

    _, plain, _ = trained()
    cache = keylayers.PrefixCache(1e-6, tmp_path)  # a kilobyte: eight hidden states
    _, weights, counts = trained(cache=cache)
    assert differs_by(weights, plain) == 0
    assert (cache.num_read, cache.num_computed) == (0, STEPS)
    assert counts == [STEPS] * NUM_BLOCKS


def test_another_text_is_another_example(tmp_path):
    from keylayers.training.hidden_states import examples_of

    ids = torch.tensor([[0, 5, 6], [5, 6, 0], [5, 6, 7], [5, 6, 0]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0]])
    digests = [one.digest for one in examples_of(ids, mask, None)]
    assert len(set(digests)) == 3  # positions count too
    assert digests[1] == digests[3]
    moved = examples_of(ids, mask, torch.tensor([[3, 4, 5]]))
    assert not set(digests) & {one.digest for one in moved}
    assert examples_of(ids, torch.tensor([[1, 0, 1]] * 4), None) is None


def test_frozen_blocks_that_change_are_found_out(tmp_path):
    """Such as noise that no option tells of."""
    import keylayers
    from keylayers.errors import GuardError

    class Noise(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            with torch.no_grad():
                model.get_base_model().model.layers[0].mlp.down_proj.weight.mul_(1.001)

    cache = keylayers.PrefixCache(SMALL, tmp_path)
    with pytest.raises(GuardError, match="must be the same in every epoch, but it differs by"):
        trained(cache=cache, callbacks=[Noise()])
    cache.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": r"model\.layers\.[02]\..*proj"}, "frozen blocks below the lowest trained"),
        ({"targets": r"model\.(embed_tokens|layers\.2\..*proj)"}, "frozen blocks below the lowest"),
        (
            {
                "activation_checkpointing": True,
                "activation_checkpointing_kwargs": {"use_reentrant": True},
            },
            "set use_reentrant to False",
        ),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha is 5.0"),
    ],
)
def test_what_makes_it_wrong_or_idle_is_refused(options, message, tmp_path):
    import keylayers
    from keylayers.errors import ConfigError

    with pytest.raises(ConfigError, match=message):
        trained(cache=keylayers.PrefixCache(SMALL, tmp_path), **options)
    assert list(tmp_path.iterdir()) == []


def test_dropout_is_refused(tmp_path):
    import keylayers
    from keylayers.errors import ConfigError

    cache = keylayers.PrefixCache(SMALL, tmp_path)
    trainer, _, _ = trained(max_steps=1)
    trainer.model.config.attention_dropout = 0.1
    with pytest.raises(ConfigError, match=r"attention_dropout is 0\.1"):
        cache.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_a_full_disk_is_one_line(tmp_path):
    import keylayers
    from keylayers.errors import ConfigError

    with pytest.raises(ConfigError, match=r"must fit on the disk, but 1e\+09 GiB do not"):
        trained(cache=keylayers.PrefixCache(1e9, tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def upper(tiny, tmp_path_factory):
    """A ranking whose best modules lie in the last block."""
    output = tmp_path_factory.mktemp("ranked")
    assert rank(tiny, output) == 0
    content = json.loads((output / "ranking.json").read_text())
    modules = content["modules"]
    for place, module in enumerate(modules):
        module["score"], module["rank"] = float(place), len(modules) - place
    (output / "ranking.json").write_text(json.dumps(content))
    return output


@pytest.mark.parametrize("update", ["lora", "full"])
def test_the_command_trains_the_same(upper, tmp_path, capsys, update, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    common = ["--ranking", upper, "--budget", "6", "--steps", "20", "--update", update]
    losses = {}
    for name, cache in (("plain", []), ("cached", ["--prefix-cache-gib", SMALL])):
        assert keylayers("train", *common, *cache, "--output", tmp_path / name) == 0
        record = json.loads((tmp_path / name / "keylayers.json").read_text())
        losses[name] = record["losses"]
    assert losses["cached"] == pytest.approx(losses["plain"], rel=1e-5)
    assert record["prefix_cache"]["num_blocks"] == 2
    assert record["prefix_cache"]["num_read"] > 0
    notes = " ".join(capsys.readouterr().err.split())
    assert "the 2 frozen blocks were read instead of computed for" in notes
    assert sorted(one.name for one in tmp_path.iterdir()) == ["cached", "plain"]


@pytest.mark.parametrize(
    ("steps", "budget", "size", "message"),
    [
        (2, 6, SMALL, "needs more than one pass"),
        (40, 6, 0, "`prefix_cache_gib` must be above 0"),
        (40, 20, SMALL, "block 0 or what lies before it is trained"),
    ],
)
def test_an_idle_cache_is_refused(upper, tmp_path, capsys, steps, budget, size, message):
    options = ("--ranking", upper, "--budget", budget, "--steps", steps)
    output = ("--output", tmp_path / "t")
    assert keylayers("train", *options, "--prefix-cache-gib", size, *output) == 2
    assert message in complaint(capsys)
    assert list(tmp_path.iterdir()) == []
