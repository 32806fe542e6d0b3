# SPDX-License-Identifier: Apache-2.0
"""What scores are taken on: batches by the mask's own seed, a model without chance, any shape."""

from itertools import islice

import pytest
import torch
from datasets import Dataset

from architectures import ARCHITECTURES, trainer_of
from keylayers import rank_modules
from keylayers.apply.trainable import add_lora
from keylayers.data.options import DataOptions
from keylayers.data.prepare import prepare
from keylayers.errors import ConfigError
from keylayers.model.loading import load_adapter, load_model, load_tokenizer
from keylayers.model.modules import map_modules
from keylayers.model.options import ModelOptions
from keylayers.trainers.batches import _in_other_blocks
from keylayers.trainers.loss import TrainerLoss
from keylayers.training.options import TrainingOptions
from keylayers.training.run import make_trainer
from keylayers.updates import adapter_updates
from trainers import build


def command_line_trainer(tiny, **options):
    """The trainer that `keylayers rank` uses, with the adapter of the tiny files."""

    source = ModelOptions(model=str(tiny / "model"))
    tokenizer = load_tokenizer(source)
    model = load_adapter(load_model(source), str(tiny / "adapter"))
    data = prepare(DataOptions(data=str(tiny / "data.jsonl")), tokenizer, 64)
    options = TrainingOptions(**{"batch_size": 4, **options})
    return make_trainer(model, tokenizer, data.train, options, num_steps=1)


def ranked(trainer, **options):
    return [one.score for one in rank_modules(trainer, **options).modules]


@pytest.mark.parametrize("method", ["elimination", "path", "ila"])
def test_the_masks_seed_draws_other_batches(tiny, method):
    trainer = command_line_trainer(tiny)
    quick = {"method": method} | ({"mask_steps": 3} if method == "ila" else {"mask_batches": 2})
    scores = {seed: ranked(trainer, mask_seed=seed, **quick) for seed in (None, 0, 1)}
    assert scores[None] == scores[0]  # the training's seed
    assert scores[0] != scores[1]
    assert scores[1] == ranked(trainer, mask_seed=1, **quick)
    assert (trainer.args.seed, trainer.args.data_seed) == (0, 0)
    assert trainer.accelerator.dataloader_config.data_seed == 0


def test_batches_of_kto_keep_their_neighbours_and_come_in_other_orders():
    """It compares the answers of a batch; TRL pairs each with its neighbour beforehand."""

    options = {"per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    trainer = build("KTO", "config", **options)
    in_order = {str(batch["KL_input_ids"]) for batch in trainer.get_train_dataloader()}
    source = TrainerLoss(trainer)
    epochs = []
    for seed in range(4):
        with source.quiet():
            found = list(islice(source.batches(seed), len(in_order)))
        epochs.append(tuple(str(batch["KL_input_ids"]) for batch in found))
    assert len(in_order) == 4
    assert all(set(epoch) == in_order for epoch in epochs)
    assert len(set(epochs)) > 1


def test_a_shorter_block_stays_last():
    data = Dataset.from_dict({"x": range(11)})
    orders = (_in_other_blocks(data, 4, torch.Generator().manual_seed(one)) for one in range(8))
    assert {tuple(one["x"]) for one in orders} == {
        (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
        (4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10),
    }


def test_repeats_look_at_other_batches(tiny):
    trainer = command_line_trainer(tiny)
    found = rank_modules(trainer, mask_batches=1, until_stable=0.3).provenance["mask"]
    assert len(set(found["losses"])) > len(found["losses"]) / 2


@pytest.fixture
def opt():
    """An OPT with LoRA on all modules: it has dropout of its own and flattens all tokens."""

    architecture = next(one for one in ARCHITECTURES if one.title == "OPT")
    base = architecture.build()
    assert base.config.dropout > 0
    tuned = add_lora(base, [info.name for info in map_modules(base)], r=2, lora_alpha=8)
    trainer = trainer_of(tuned, architecture)
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_scores_do_not_hang_on_what_dropout_draws(opt):
    options = {"method": "leave-one-out", "mask_batches": 1}
    torch.manual_seed(1)
    first = ranked(opt, **options)
    opt.model.eval()
    with torch.no_grad():
        whole = float(opt.model(**next(iter(opt.get_train_dataloader()))).loss)
    assert first == pytest.approx(ranked(opt, mask_seed=0, **options), abs=1e-5)

    losses = rank_modules(opt, **options).provenance["mask"]["losses"]
    assert losses[0] == pytest.approx(whole, abs=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_the_fisher_trace_is_per_example_where_a_model_flattens_its_tokens(opt):
    """Against gradients of one example at a time; `fc1` sees (tokens of all examples, width)."""
    scores = dict(
        zip(
            [one.module.name for one in updates_of(opt)],
            ranked(opt, method="fisher", mask_batches=1),
            strict=True,
        )
    )
    model = opt.model.eval()
    batch = next(iter(opt.get_train_dataloader()))
    name = "model.decoder.layers.0.fc1"
    weight = model.get_base_model().get_submodule(name).base_layer.weight
    weight.requires_grad_(True)
    total = 0.0
    with model.disable_adapter():
        for row in range(len(batch["labels"])):
            loss = model(**{key: value[row : row + 1] for key, value in batch.items()}).loss
            (gradient,) = torch.autograd.grad(loss, weight)
            total += float(gradient.square().sum())
    assert scores[name] == pytest.approx(total / len(batch["labels"]), rel=1e-4)


def updates_of(trainer):
    return adapter_updates(trainer.model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora-drop", "plop", "gradient-norm", "aletheia", "cka"])
def test_methods_take_a_model_that_flattens_its_tokens(opt, method):
    assert all(torch.isfinite(torch.tensor(ranked(opt, method=method, mask_batches=1))))


def test_eva_says_that_batches_are_too_short(tiny):
    trainer = command_line_trainer(tiny, batch_size=1)
    trainer.train_dataset = Dataset.from_dict(
        {"input_ids": [[1, 2, 3, 4]] * 4, "labels": [[-100, -100, 3, 4]] * 4}
    )
    with pytest.raises(ConfigError, match="at least 16 labelled tokens, but the longest has 2"):
        ranked(trainer, method="eva", mask_batches=1)
