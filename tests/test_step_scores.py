# SPDX-License-Identifier: Apache-2.0
"""Scores from the steps of a training: they add up, and the training does not notice."""

import pytest
import torch

from keylayers import StepScores
from keylayers.errors import ModelError, RankingError
from keylayers.evaluation.held_out import held_out_loss
from tiny_files import NUM_MODULES
from trainers import build

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
EXACT = {
    "max_steps": 12,
    "learning_rate": 0.003,
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 8,  # all rows: one and the same batch in each step
}


def with_scores(kind="SFT", **options):
    """A trainer that is not trained yet, and the scores that its training will have."""
    trainer = build(kind, "model", is_trained=False, is_moved=False, **options)
    scores = StepScores()
    trainer.add_callback(scores)
    return trainer, scores


def test_scores_sum_to_the_loss_reduction_along_the_way_and_are_a_ranking():
    trainer, scores = with_scores(**EXACT)
    with pytest.raises(RankingError, match="needs a training, but no step was taken"):
        scores.ranking()
    before = held_out_loss(trainer, trainer.train_dataset)
    trainer.train()
    fall = before - held_out_loss(trainer, trainer.train_dataset)
    assert scores.num_steps == 12
    assert len(scores.scores) == NUM_MODULES
    assert fall > 0.02
    assert sum(scores.scores.values()) == pytest.approx(fall, rel=0.05)
    assert {module.name: module.score for module in scores.ranking().modules} == scores.scores


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_the_training_does_not_notice(kind):
    first = build(kind, "model", is_moved=False, max_steps=3)
    second, _ = with_scores(kind, max_steps=3)
    second.train()
    pairs = zip(first.model.parameters(), second.model.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_what_is_not_trained_scores_nothing_and_a_second_training_starts_from_zero():
    trainer, scores = with_scores(max_steps=2)
    for name, parameter in trainer.model.named_parameters():
        if "layers.1.mlp.up_proj" in name:
            parameter.requires_grad_(False)
    trainer.train()
    found = dict(scores.scores)
    assert [name for name, score in found.items() if score == 0] == ["model.layers.1.mlp.up_proj"]
    trainer.train()
    assert scores.num_steps == 2
    assert dict(scores.scores) != found


def test_a_model_without_an_adapter_is_refused():
    trainer, _ = with_scores("plain")
    trainer.model = trainer.model.unload()
    with pytest.raises(ModelError, match="must carry a PEFT adapter"):
        trainer.train()
