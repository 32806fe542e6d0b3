# SPDX-License-Identifier: Apache-2.0
"""What scores are taken on: batches by the mask's own seed, a model without chance, any shape."""

import math
from itertools import islice

import pytest
import torch
from datasets import Dataset
from transformers import Trainer

from architectures import NAMED
from architectures import trainer_of as training_of
from keylayers import rank_modules
from keylayers.apply.trainable import add_lora
from keylayers.errors import ConfigError, DataError, LossError, ModelError
from keylayers.model.modules import map_modules
from keylayers.trainers.data import _in_other_blocks
from keylayers.trainers.loss import TrainerLoss
from scored import arguments, data, noisy, noisy_model, score, scores_of, trainer_of
from trainers import build

from tiny_models import tiny_llama


@pytest.mark.parametrize("method", ["elimination", "path", "ila"])
def test_the_masks_seed_draws_other_batches(method):
    by_default, same, other, again = (
        scores_of(noisy(), method, mask_seed=seed) for seed in (None, 42, 1, 1)
    )
    assert by_default == same  # the training's seed
    assert same != other == again
    assert (noisy().args.seed, noisy().args.data_seed) == (42, None)
    assert noisy().accelerator.dataloader_config.data_seed is None


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


@pytest.fixture(scope="module")
def opt():
    """An OPT with LoRA on all modules: it has dropout of its own and flattens all tokens."""
    base = NAMED["OPT"].build()
    assert base.config.dropout > 0
    tuned = add_lora(base, [info.name for info in map_modules(base)], r=2, lora_alpha=8)
    trainer = training_of(tuned, NAMED["OPT"])
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_scores_do_not_hang_on_what_dropout_draws(opt):
    opt.model.eval()
    with torch.no_grad():
        whole = float(opt.model(**next(iter(opt.get_train_dataloader()))).loss)
    opt.model.train()
    torch.manual_seed(1)
    found = score(opt, "leave-one-out", mask_batches=1)
    assert found.losses[0] == pytest.approx(whole, abs=1e-6)
    again = score(opt, "leave-one-out", mask_batches=1, mask_seed=0)
    assert found.scores == pytest.approx(again.scores, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_fisher_trace_is_per_example_where_a_model_flattens_its_tokens(opt):
    """Against gradients of one example at a time; `fc1` sees (tokens of all examples, width)."""
    name = "model.decoder.layers.0.fc1"
    trace = scores_of(opt, "fisher", mask_batches=1)[name]
    model = opt.model.eval()
    batch = next(iter(opt.get_train_dataloader()))
    weight = model.get_base_model().get_submodule(name).base_layer.weight.requires_grad_(True)
    squares = []
    with model.disable_adapter():
        for row in range(len(batch["labels"])):
            loss = model(**{key: value[row : row + 1] for key, value in batch.items()}).loss
            squares.append(float(torch.autograd.grad(loss, weight)[0].square().sum()))
    weight.requires_grad_(False)
    assert trace == pytest.approx(sum(squares) / len(squares), rel=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["lora-drop", "plop", "gradient-norm", "aletheia", "cka"])
def test_methods_take_a_model_that_flattens_its_tokens(opt, method):
    assert all(map(math.isfinite, score(opt, method, mask_batches=1).scores))


def test_eva_says_that_batches_are_too_short():
    trainer = trainer_of(noisy_model(), per_device_train_batch_size=1)
    row = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}
    trainer.train_dataset = Dataset.from_list([row] * 4)
    with pytest.raises(ConfigError, match="at least 16 labelled tokens, but the longest has 2"):
        score(trainer, "eva", mask_batches=1)


def test_gradient_accumulation_of_the_trainer_changes_nothing():
    often = trainer_of(noisy_model(), gradient_accumulation_steps=4)
    assert scores_of(often, "ila") == scores_of(noisy(), "ila")


def test_scores_come_from_a_data_set_of_their_own_if_one_is_given():
    def ranked(**more):
        ranking = rank_modules(trainer, "path", mask_batches=1, path_points=1, **more)
        return [module.score for module in ranking.modules]

    trainer = trainer_of(noisy_model())
    given, other = trainer.train_dataset, data(40).select(range(24, 40))
    own, aside = ranked(), ranked(mask_dataset=other)
    assert trainer.train_dataset is given
    trainer.train_dataset = other
    assert own != aside == ranked()


def test_a_loss_that_is_not_finite_is_reported_with_its_step():
    class Broken(Trainer):
        def compute_loss(self, model, inputs, **options):
            return super().compute_loss(model, inputs, **options) * factors.pop()

    trainer, factors = Broken(noisy_model(), arguments(), train_dataset=data()), [math.nan, 1.0]
    with pytest.raises(LossError, match="it is nan at mask step 2"):
        score(trainer, "ila")
    assert not any("keygate" in name for name, _ in trainer.model.named_modules())


def test_a_trainer_without_an_update_or_without_data_is_refused():
    with pytest.raises(ModelError, match="must carry a PEFT adapter"):
        rank_modules(trainer_of(tiny_llama()))
    with pytest.raises(DataError, match="must have a `train_dataset`"):
        rank_modules(Trainer(model=noisy_model(), args=arguments()))
