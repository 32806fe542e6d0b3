# SPDX-License-Identifier: Apache-2.0
"""The reference of a preference loss is never the update that is ranked."""

import math

import pytest
from trl.trainer.utils import add_fused_lm_head

import keylayers
from keylayers.errors import ConfigError
from keylayers.gates import gated
from keylayers.trainers.loss import TrainerLoss
from keylayers.updates import adapter_updates
from trainers import base_model, build, with_noise

UNMOVED = {"DPO": math.log(2), "KTO": 0.5}  # the loss of a model that is its own reference


pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # TRL's


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


def test_a_record_says_what_the_reference_was():
    def reference(trainer):
        return keylayers.rank_modules(trainer, mask_batches=1).provenance["reference"]

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
        keylayers.rank_modules(trainer)
    trainer = around_a_finished_adapter("DPO")
    trainer.ref_model = trainer.model.get_base_model()
    with pytest.raises(ConfigError, match="`ref_model` must be another copy"):
        keylayers.rank_modules(trainer)
