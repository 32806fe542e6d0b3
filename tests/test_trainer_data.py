# SPDX-License-Identifier: Apache-2.0
"""What a user's trainer is measured on: examples that it did not see when it was built, means over
batches of any kind, and the reference of a preference loss, which is never what is ranked.
"""

import math

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer
from trl.trainer.utils import add_fused_lm_head

from keylayers import mask_curve, rank_modules
from keylayers.errors import ConfigError, DataError
from keylayers.evaluation.held_out import held_out_loss
from keylayers.gates import gated
from keylayers.trainers.data import prepared_for
from keylayers.trainers.loss import TrainerLoss
from keylayers.updates import adapter_updates
from scored import arguments
from trainers import DATA, FROM_TRL, base_model, build, with_noise

from tiny_models import SIZES, VOCABULARY

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL's
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


@pytest.mark.parametrize("kind", ["DPO", "KTO", "Reward", "classes"])
def test_a_held_out_loss_is_the_mean_over_pairs_or_rows_whatever_the_batches(kind):
    if kind == "classes":  # labels without an axis of tokens; the last batch is smaller
        torch.manual_seed(0)
        model = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3))
        rows = torch.randint(3, VOCABULARY, (7, 5)).tolist()
        held_out = Dataset.from_dict({"input_ids": rows, "labels": [0, 1, 2, 0, 1, 2, 0]})
        args = arguments(per_device_eval_batch_size=3)
        trainer = Trainer(model=model, args=args, train_dataset=held_out)
    else:
        # KTO's other loss compares with an estimate from the batch, so it is no mean over rows
        options = {"loss_type": "apo_zero_unpaired"} if kind == "KTO" else {}
        trainer = build(kind, "config", per_device_eval_batch_size=3, **options)
        held_out = DATA[kind](first=8)
    one_by_one = [held_out_loss(trainer, held_out.select([row])) for row in range(len(held_out))]
    mean = sum(one_by_one) / len(one_by_one)
    assert held_out_loss(trainer, held_out) == pytest.approx(mean, rel=1e-4)


UNMOVED = {"DPO": math.log(2), "KTO": 0.5}  # the loss of a model that is its own reference


def around_a_finished_adapter(kind, **options):
    """As users do who rank what they have: TRL copies the finished adapter as the reference."""
    return build(kind, "model", is_trained=False, is_moved=False, **options)


def reference_model(kind):
    model = base_model(kind)
    add_fused_lm_head(model)  # as the trainer does with one that it is built with
    return model


def losses_at(trainer, gate):
    source = TrainerLoss(trainer)
    updates = adapter_updates(trainer.model)
    with source.quiet(), gated(trainer.model, updates, initial_score=gate, link="identity"):
        return source.held_out(list(trainer.get_eval_dataloader(trainer.train_dataset))).losses


@pytest.mark.parametrize("kind", UNMOVED)
def test_a_finished_adapter_is_compared_with_the_base_model_and_not_with_itself(kind):
    trainer = around_a_finished_adapter(kind)
    explicit = around_a_finished_adapter(kind)
    explicit.ref_model = reference_model(kind)
    found = losses_at(trainer, 1.0)
    assert found == pytest.approx(losses_at(explicit, 1.0), abs=1e-6)
    closed = losses_at(trainer, 0.0)
    assert closed == pytest.approx([UNMOVED[kind]] * len(closed), abs=1e-6)
    assert all(abs(loss - UNMOVED[kind]) > 1e-3 for loss in found)
    assert list(trainer.model.peft_config) == ["default", "ref"]
    updates = adapter_updates(trainer.model)
    order = [update.module.name for update in updates]
    curve = mask_curve(trainer, updates, order, DATA[kind](first=8), num_points=2)
    assert curve.losses[0] == pytest.approx(UNMOVED[kind], abs=1e-6)
    assert abs(curve.losses[1] - UNMOVED[kind]) > 1e-3


def test_a_record_says_what_the_reference_was():
    def reference(trainer):
        return rank_modules(trainer, mask_batches=1).provenance["reference"]

    trainer = around_a_finished_adapter("DPO")
    assert reference(trainer) == "base"
    with_noise(trainer.model, seed=5)  # training has begun: "ref" is where it started from
    assert reference(trainer) == "adapter ref"
    assert reference(build("DPO", "config")) == "base"
    trainer.ref_model = reference_model("DPO")
    assert reference(trainer) == "ref_model"
    assert reference(build("SFT", "config")) is None


def test_references_that_cannot_be_right_are_refused():
    trainer = around_a_finished_adapter("DPO", precompute_ref_log_probs=True)
    with pytest.raises(ConfigError, match="computed with the finished adapter"):
        rank_modules(trainer)
    trainer = around_a_finished_adapter("DPO")
    trainer.ref_model = trainer.model.get_base_model()
    with pytest.raises(ConfigError, match="`ref_model` must be another copy"):
        rank_modules(trainer)
