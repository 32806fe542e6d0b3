# SPDX-License-Identifier: Apache-2.0
"""What TRL breaks in a naive mask stage, and the guards that catch the next one."""

import math

import pytest
import torch

from test_gates import assert_same, state_of
from trainers import OwnLossTrainer, base_model, build, move

WITH_REFERENCE = ("dpo", "kto", "grpo")


def losses_at(trainer, value):
    from keylayers.gates import gated
    from keylayers.mask.trainer_loss import TrainerLoss, batch_losses
    from keylayers.updates import lora_updates

    source = TrainerLoss(trainer)
    updates = lora_updates(trainer.model)
    with source.quiet(), gated(trainer.model, updates, initial_score=value, link="identity"):
        batches = list(trainer.get_eval_dataloader(trainer.eval_dataset["other"]))
        return batch_losses(source, batches)


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_finished_adapter_is_compared_with_the_base_model_and_not_with_itself(kind, tmp_path):
    trainer = build(kind, tmp_path, is_ready=True)
    explicit = build(kind, tmp_path, is_ready=True)
    explicit.ref_model = base_model()
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(explicit.ref_model)
    found = losses_at(trainer, 1.0).losses
    assert found == pytest.approx(losses_at(explicit, 1.0).losses, abs=1e-6)
    closed = losses_at(trainer, 0.0).losses
    unmoved = {"dpo": math.log(2), "kto": 0.5}[kind]
    assert closed == pytest.approx([unmoved] * len(closed), abs=1e-6)
    assert all(abs(loss - unmoved) > 1e-3 for loss in found)
    assert list(trainer.model.peft_config) == ["default", "ref"]


def test_a_reference_that_training_started_from_stays(tmp_path):
    import keylayers

    options = keylayers.MaskOptions(mask_batches=1)
    trainer = build("dpo", tmp_path, is_ready=True)
    assert keylayers.rank_modules(trainer, options).provenance["reference"] == "base"
    move(trainer.model, seed=5)
    assert keylayers.rank_modules(trainer, options).provenance["reference"] == "adapter ref"
    from_the_base = build("dpo", tmp_path)
    assert keylayers.rank_modules(from_the_base, options).provenance["reference"] == "base"
    assert keylayers.rank_modules(build("sft", tmp_path), options).provenance["reference"] is None


def test_references_that_cannot_be_right_are_refused(tmp_path):
    import keylayers
    from keylayers.errors import ConfigError

    trainer = build("dpo", tmp_path, is_ready=True, precompute_ref_log_probs=True)
    with pytest.raises(ConfigError, match="computed with the finished adapter"):
        keylayers.rank_modules(trainer)
    trainer = build("dpo", tmp_path, is_ready=True)
    trainer.ref_model = trainer.model.get_base_model()
    with pytest.raises(ConfigError, match="`ref_model` must be another copy"):
        keylayers.rank_modules(trainer)


def test_likelihoods_that_were_computed_beforehand_are_used(tmp_path):
    import keylayers

    options = keylayers.MaskOptions(mask_batches=1, mask_seed=3)
    found = []
    for precomputed in (False, True):
        trainer = build("dpo", tmp_path, precompute_ref_log_probs=precomputed)
        move(trainer.model)
        ranking = keylayers.rank_modules(trainer, options)
        found.append([module.score for module in ranking.modules])
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("kind", WITH_REFERENCE)
def test_no_adapter_weight_is_thawed_when_a_trainer_switches_adapters(kind, tmp_path, monkeypatch):
    from keylayers.gates import gated
    from keylayers.mask.trainer_loss import TrainerLoss
    from keylayers.updates import lora_updates

    trainer = build(kind, tmp_path, is_ready=True)
    model = trainer.model
    trained, passes = set(), 0

    def note(*_):
        nonlocal passes
        passes += 1
        trained.update(name for name, one in model.named_parameters() if one.requires_grad)

    source = TrainerLoss(trainer)
    if kind == "grpo":  # PEFT's first `generate` leaves a method of its own on the model
        model.generate(torch.ones(1, 1, dtype=torch.long), max_new_tokens=1)
    before = state_of(model)
    with source.quiet(), gated(model, lora_updates(model), initial_score=1.0) as gates:
        handle = model.get_base_model().model.register_forward_hook(note)
        source.backward(next(source.batches()), step=1)
        note()
        handle.remove()
        gates.gradient()
    assert passes >= 3
    assert trained
    assert all(name.endswith("keygate.score") for name in trained)
    assert_same(before, state_of(model))
    with model.disable_adapter():
        pass
    assert any("lora_" in name for name, one in model.named_parameters() if one.requires_grad)


class Spoiling(OwnLossTrainer):
    spoil = None

    def compute_loss(self, model, inputs, **options):
        loss = super().compute_loss(model, inputs, **options)
        self.spoil(model)
        return loss


def thaw(model):
    model.get_input_embeddings().weight.requires_grad_(True)


def give_gradient(model):
    weight = model.get_input_embeddings().weight
    weight.grad = torch.zeros_like(weight)


def cast_gates(model):
    for name, parameter in model.named_parameters():
        if "keygate" in name:
            parameter.data = parameter.data.bfloat16()
            parameter.grad = None


SPOILS = [
    (thaw, r"1 other weights became trainable, first .*embed_tokens"),
    (give_gradient, r"1 other weights got a gradient, first .*embed_tokens"),
    (cast_gates, r"gates must be float32, but that of .*q_proj became torch.bfloat16"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILS)
def test_guards_name_what_a_trainer_does_to_other_weights(spoil, message, tmp_path):
    import keylayers
    from keylayers.errors import GuardError

    trainer = build("own loss", tmp_path, is_ready=True)
    trainer.__class__ = Spoiling
    trainer.spoil = spoil
    with pytest.raises(GuardError, match=message):
        keylayers.rank_modules(trainer)
    assert not trainer.model.get_input_embeddings().weight.requires_grad
    assert trainer.model.get_input_embeddings().weight.grad is None
