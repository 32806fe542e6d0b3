# SPDX-License-Identifier: Apache-2.0
"""Learned gates, and rankings of trainers from Python."""

import math

import pytest
import torch
from transformers import Trainer

import keylayers
from keylayers.errors import DataError, LossError, ModelError
from keylayers.scores.ila import standard_errors
from keylayers.scores.score_modules import score_modules
from keylayers.scores.scoring_options import scoring_options
from keylayers.updates import adapter_updates
from scored import (
    arguments,
    batches_of,
    data,
    noisy,
    noisy_model,
    trainer_of,
)

from tiny_models import tiny_llama


def options_of(**values):
    own = {"mask_learning_rate": 1.0, "mask_steps": 3, "initial_score": 2.0}
    return scoring_options(**{"method": "ila", "mask_optimizer": "sgd"} | own | values)


def learn(trainer, **values):
    return score_modules(trainer, adapter_updates(trainer.model), options_of(**values))


def test_one_step_of_sgd_is_the_formula():
    """Independently: the masked weight is written out and autograd does the rest."""
    trainer = noisy()
    learned = learn(trainer, mask_steps=1, initial_score=0.3)
    (batch,) = batches_of(trainer, 1)
    base = tiny_llama()
    scores = torch.full((len(learned.scores),), 0.3, requires_grad=True)
    weights = {}
    for gate, name in zip(torch.sigmoid(scores), learned.module_names, strict=True):
        layer = trainer.model.get_base_model().get_submodule(name)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        update = layer.scaling["default"] * product
        weights[f"{name}.weight"] = base.get_submodule(name).weight + gate * update
    loss = torch.func.functional_call(base, weights, kwargs=dict(batch)).loss
    (gradient,) = torch.autograd.grad(loss, scores)
    assert learned.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    assert list(learned.scores) == pytest.approx((0.3 - gradient).tolist(), abs=1e-6)
    assert max(abs(score - 0.3) for score in learned.scores) > 1e-4


def test_gradient_accumulation_of_the_trainer_changes_nothing():
    often = learn(trainer_of(noisy_model(), gradient_accumulation_steps=4))
    assert learn(noisy()).scores == often.scores


def test_a_loss_that_is_not_finite_is_reported_with_its_step():
    class Broken(Trainer):
        calls = 0

        def compute_loss(self, model, inputs, **options):
            Broken.calls += 1
            loss = super().compute_loss(model, inputs, **options)
            return loss * math.nan if Broken.calls == 2 else loss

    trainer = Broken(model=noisy_model(), args=arguments(), train_dataset=data())
    with pytest.raises(LossError, match="it is nan at mask step 2"):
        learn(trainer)
    assert not any("keygate" in name for name, _ in trainer.model.named_modules())


def test_standard_errors_match_the_spread_of_many_runs():
    generator = torch.Generator().manual_seed(0)
    num_runs, num_steps = 400, 60
    drift = torch.linspace(1.0, 0.2, num_steps)[:, None]
    noise = 0.5 * torch.randn(num_steps, num_runs, generator=generator)
    paths = torch.cat([torch.zeros(1, num_runs), (drift + noise).cumsum(dim=0)])
    true_spread = paths[-1].std()
    estimates = standard_errors(paths)
    assert float(estimates.square().mean().sqrt()) == pytest.approx(float(true_spread), rel=0.1)
    assert standard_errors(paths[:20]) is None


def test_scores_come_from_a_data_set_of_their_own_if_one_is_given():
    def ranked(**more):
        return [one.score for one in keylayers.rank_modules(trainer, options_of(), **more).modules]

    trainer = trainer_of(noisy_model())
    given, other = trainer.train_dataset, data(40).select(range(24, 40))
    own, aside = ranked(), ranked(mask_dataset=other)
    assert trainer.train_dataset is given
    trainer.train_dataset = other
    assert own != aside == ranked()


def test_a_trainer_without_an_update_or_without_data_is_refused():
    with pytest.raises(ModelError, match="must carry a PEFT adapter"):
        keylayers.rank_modules(trainer_of(tiny_llama()))
    with pytest.raises(DataError, match="must have a `train_dataset`"):
        keylayers.rank_modules(Trainer(model=noisy_model(), args=arguments()))
