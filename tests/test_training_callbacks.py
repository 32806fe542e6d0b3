# SPDX-License-Identifier: Apache-2.0
"""Callbacks for anyone's training: `ShallowBackward` does less of it, `StepScores` watches it."""

from collections import Counter

import pytest
import torch
from datasets import Dataset

from keylayers import ShallowBackward, StepScores
from keylayers.errors import ModelError, RankingError
from keylayers.evaluation.held_out import held_out_loss
from keylayers.training.options import TrainingOptions
from keylayers.training.run import fine_tune, make_trainer, new_adapter
from tiny_files import NUM_MODULES, tiny_model
from trainers import TOKENIZER, build, lora

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")


def runs_of_blocks(model):
    """How often each block will have run, including recomputations."""
    counts = Counter()
    for index, block in enumerate(model.get_base_model().model.layers):
        inner = block.self_attn.q_proj  # runs again with its block
        inner.register_forward_hook(lambda *_, index=index: counts.update([index]))
    return counts


def trained(kind="SFT", targets=r".*\.(1|2)\..*proj", callbacks=(), **options):
    """A trained trainer, its LoRA matrices, and how often each block ran."""
    options |= {"is_trained": False, "is_moved": False, "max_steps": 3}
    options |= {"activation_checkpointing": True, "peft": lora(kind, target_modules=targets)}
    trainer = build(kind, "config", **options)
    counts = runs_of_blocks(trainer.model)
    for callback in callbacks:
        trainer.add_callback(callback())
    trainer.train()
    weights = {name: value for name, value in trainer.model.state_dict().items() if "lora_" in name}
    return trainer, weights, counts


@pytest.mark.parametrize("kind", ["SFT", "DPO", "ORPO"])
def test_frozen_blocks_are_not_recomputed_and_the_training_is_the_same(kind):
    _, plain, full = trained(kind)
    trainer, weights, counts = trained(kind, callbacks=[ShallowBackward, StepScores])
    torch.testing.assert_close(weights, plain, rtol=0, atol=0)
    assert any(bool(value.any()) for name, value in weights.items() if "lora_B" in name)
    assert full[0] == full[1] == full[2]
    assert counts[0] < counts[1] == full[1]
    hooks = trainer.model.get_input_embeddings()._forward_hooks.values()
    assert not any(hook.__module__.startswith("keylayers") for hook in hooks)


NEEDS_MORE = {
    "trained embeddings": {"targets": r"model\.(embed_tokens|layers\.2\..*proj)"},
    "gradients of inputs": {"activation_checkpointing_kwargs": {"use_reentrant": True}},
}


@pytest.mark.parametrize("options", NEEDS_MORE.values(), ids=NEEDS_MORE)
def test_gradients_that_are_needed_are_kept(options):
    _, plain, full = trained(**options)
    _, weights, counts = trained(callbacks=[ShallowBackward], **options)
    assert counts == full
    torch.testing.assert_close(weights, plain, rtol=0, atol=0)
    if "targets" in options:
        assert any("embed_tokens" in name and bool(value.any()) for name, value in weights.items())


def test_the_one_training_path_does_it_by_itself():
    options = TrainingOptions(batch_size=2, gradient_checkpointing=True, warmup_steps=0)
    base = tiny_model(len(TOKENIZER))
    names = [f"model.layers.2.mlp.{kind}_proj" for kind in ("gate", "up", "down")]
    model = new_adapter(base, names, options, num_steps=2)
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4
    trainer = make_trainer(model, TOKENIZER, Dataset.from_list(rows), options, num_steps=2)
    counts = runs_of_blocks(model)
    fine_tune(trainer)
    assert counts == {0: 2, 1: 2, 2: 4}


# Without noise and rounding; all rows are in each step's batch.
EXACT = {
    "learning_rate": 0.003, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
    "max_steps": 12, "per_device_train_batch_size": 8,
}  # fmt: skip


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
