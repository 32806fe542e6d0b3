# SPDX-License-Identifier: Apache-2.0
"""Examples that a trainer did not see when it was built, and means over batches of any kind."""

import math

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer

from keylayers import mask_curve, rank_modules
from keylayers.errors import DataError
from keylayers.evaluation.held_out import held_out_loss
from keylayers.trainers.data import prepared_for
from keylayers.updates import adapter_updates
from scored import arguments
from trainers import DATA, FROM_TRL, build

from tiny_models import SIZES, VOCABULARY

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
PREPARED_BY_TRAINER = ["SFT", "DPO", "KTO", "Reward", "GRPO"]


def scores_of(trainer, mask_dataset=None):
    ranking = rank_modules(
        trainer, "path", mask_batches=2, path_points=2, mask_dataset=mask_dataset
    )
    return [module.score for module in ranking.modules]


@pytest.mark.parametrize("kind", PREPARED_BY_TRAINER)
def test_raw_examples_are_prepared_as_the_trainer_prepared_its_own(kind):
    trainer = build(kind, "config", is_trained=False)
    train = trainer.train_dataset
    flags = [weight.requires_grad for weight in trainer.model.parameters()]
    assert scores_of(trainer, DATA[kind]()) == scores_of(trainer)
    assert scores_of(trainer, DATA[kind](first=8)) != scores_of(trainer)
    assert trainer.train_dataset is train
    assert flags == [weight.requires_grad for weight in trainer.model.parameters()]


@pytest.mark.parametrize("kind", FROM_TRL)
def test_rows_of_the_trainers_own_data_are_used_as_they_are(kind):
    trainer = build(kind, "config", is_trained=False)
    part = trainer.train_dataset.select(range(4, 8))
    assert prepared_for(trainer, part) is part


@pytest.mark.parametrize("kind", ["DPO", "KTO"])
@pytest.mark.parametrize("way", ["config", "model"])
def test_precomputed_references_are_computed_for_new_examples_with_the_trainers_own(kind, way):
    """In `__init__` nothing was trained yet; now the adapter is, and must not be its reference."""
    raw = DATA[kind](first=8)
    later = build(kind, way, precompute_ref_log_probs=True)
    at_first = build(kind, way, precompute_ref_log_probs=True, is_trained=False, data=raw)
    own, made = at_first.train_dataset, prepared_for(later, raw)
    columns = [name for name in own.column_names if name.startswith("ref_")]
    assert columns
    for column in columns:
        assert made[column][:] == pytest.approx(own[column][:], abs=1e-4)
    assert scores_of(later, raw) == scores_of(later, made)
    without = made.remove_columns(columns)
    assert prepared_for(later, without)[columns[0]][:] == made[columns[0]][:]


UNPREPARED = [
    ("ORPO", "ORPO", "must hold what ORPOTrainer reads, but it lacks chosen_input_ids, chosen"),
    ("plain", "SFT", "must hold what Trainer reads, but it lacks input_ids, labels"),
    ("DPO", "SFT", "must have the columns that DPOTrainer was given, but it lacks"),
    ("Reward", "SFT", "must have the columns that RewardTrainer was given"),
    ("GRPO", "plain", "must hold what GRPOTrainer reads, but it lacks prompt"),
]


@pytest.mark.parametrize(("kind", "given", "message"), UNPREPARED)
def test_examples_that_the_trainer_cannot_prepare_are_refused_in_one_line(kind, given, message):
    trainer = build(kind, "model", is_trained=False)
    with pytest.raises(DataError, match=message) as refused:
        scores_of(trainer, DATA[given]())
    assert "\n" not in str(refused.value)


def one_by_one(trainer, dataset):
    """The mean over rows of the loss of each alone."""
    losses = [held_out_loss(trainer, dataset.select([row])) for row in range(len(dataset))]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("kind", ["DPO", "KTO", "Reward"])
def test_a_held_out_loss_is_the_mean_over_pairs_or_rows_whatever_the_batches(kind):
    # KTO's other loss compares with an estimate from the batch, so it is no mean over rows
    options = {"loss_type": "apo_zero_unpaired"} if kind == "KTO" else {}
    trainer = build(kind, "config", per_device_eval_batch_size=3, **options)
    held_out = DATA[kind](first=8)
    assert held_out_loss(trainer, held_out) == pytest.approx(
        one_by_one(trainer, held_out), rel=1e-4
    )


def test_a_held_out_loss_of_classes_counts_every_row():
    """Labels without an axis of tokens: the last, smaller batch must not weigh too little."""
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3))
    rows = torch.randint(3, VOCABULARY, (7, 5)).tolist()
    held_out = Dataset.from_dict({"input_ids": rows, "labels": [0, 1, 2, 0, 1, 2, 0]})
    args = arguments(per_device_eval_batch_size=3)
    trainer = Trainer(model=model, args=args, train_dataset=held_out)
    assert held_out_loss(trainer, held_out) == pytest.approx(
        one_by_one(trainer, held_out), rel=1e-5
    )


def test_the_mask_curve_of_a_preference_trainer_starts_at_its_reference():
    """All gates closed, DPO's model is its reference: each margin is zero and the loss is ln 2."""
    trainer = build("DPO", "config")
    ranking = rank_modules(trainer, method="update-norm")
    order = [module.name for module in ranking.modules]
    updates = adapter_updates(trainer.model)
    curve = mask_curve(trainer, updates, order, DATA["DPO"](first=8), num_points=3)
    assert curve.losses[0] == pytest.approx(math.log(2), rel=1e-6)
    assert abs(curve.losses[-1] - curve.losses[0]) > 1e-3
