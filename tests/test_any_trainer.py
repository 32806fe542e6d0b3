# SPDX-License-Identifier: Apache-2.0
"""Stage 2 with trainers as users build them: every objective, and a loss of one's own."""

import math
from collections.abc import Mapping

import pytest
import torch

from test_gates import assert_same, state_of
from trainers import KINDS, NUM_UPDATES, base_model, build

from tiny_models import in_float64

STEP = 0.03  # of a gate; a fourth-order stencil leaves h⁴ of curvature
ULPS = 8  # of float32 that a loss may be wrong by, after some hundred operations


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second or first is second or (first != first and second != second)


def trainer_state(trainer):
    """Everything that the trainer and its state hold, containers copied, the rest by identity."""
    import copy

    from keylayers.mask.trainer_state import _is_plain

    return {
        f"{type(holder).__name__}.{name}": copy.deepcopy(value) if _is_plain(value) else id(value)
        for holder in (trainer, trainer.state)
        for name, value in vars(holder).items()
    }


def adapters(model):
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [one for one in model.modules() if isinstance(one, BaseTunerLayer)]
    state = {(tuple(one.active_adapters), one.disable_adapters) for one in layers}
    return list(model.peft_config), model.active_adapter, state


@pytest.mark.parametrize("is_ready", [False, True], ids=["peft_config", "PeftModel"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_trainer_ranks_and_is_given_back_as_it_was(kind, is_ready, tmp_path):
    import keylayers

    trainer = build(kind, tmp_path, is_ready=is_ready)
    trainer.train()
    model = trainer.model
    before = state_of(model), trainer_state(trainer), adapters(model)
    options = keylayers.MaskOptions(mask_batches=1)
    ranking = keylayers.rank_modules(trainer, options)
    assert_same(before[0], state_of(model))
    after = trainer_state(trainer)
    assert before[1].keys() == after.keys()
    assert [name for name in after if not same(before[1][name], after[name])] == []
    assert adapters(model) == before[2]
    scores = [module.score for module in ranking.modules]
    assert len(scores) == NUM_UPDATES
    assert all(math.isfinite(score) for score in scores)
    assert len(set(scores)) > NUM_UPDATES / 2
    assert ranking.provenance["trainer"] == type(trainer).__name__


def with_old_likelihoods(trainer, inputs):
    """GRPO's loss compares with the likelihood at sampling, which it takes from itself at first."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    length = inputs["completion_ids"].size(1)
    old, *_ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, length)
    return {**inputs, "old_per_token_logps": old.detach()}


def hold_divergence(trainer):
    """KTO's estimate of the divergence has no gradient in its loss: keep it while gates move."""
    found = {}
    original = trainer._compute_kl_logps

    def first_answer(model, batch):
        is_reference = trainer.model.base_model.model.model.layers[0].mlp.down_proj.disable_adapters
        return found.setdefault(is_reference, original(model, batch))

    trainer._compute_kl_logps = first_answer


@pytest.mark.parametrize("kind", KINDS)
def test_gate_gradients_are_finite_differences_of_the_trainers_own_loss(kind, tmp_path):
    """In float64 where the trainer computes in it, else within float32's rounding of the losses."""
    from keylayers.gates import gated
    from keylayers.mask.trainer_loss import TrainerLoss
    from keylayers.updates import lora_updates

    is_double = kind in ("reward", "own loss")
    model = in_float64(base_model(kind)) if is_double else base_model(kind)
    trainer = build(kind, tmp_path, is_ready=True, model=model)
    source, updates = TrainerLoss(trainer), lora_updates(trainer.model)
    gates_in = gated(trainer.model, updates, initial_score=0.6, link="identity")
    with gates_in as gates, source.quiet():
        torch.manual_seed(2)
        trainer.model.train()
        inputs = source.prepared(next(source.batches()))
        if kind == "grpo":
            inputs = with_old_likelihoods(trainer, inputs)
        if kind == "kto":
            hold_divergence(trainer)

        def loss():
            return trainer.compute_loss(trainer.model, dict(inputs))

        value = loss()
        value.backward()
        gradient, scores = gates.gradient().double(), gates.scores()
        step = 1e-4 if is_double else STEP

        def loss_at(index, distance):
            moved = scores.clone()
            moved[index] += distance
            gates.set_scores(moved)
            with torch.no_grad():
                return float(loss())

        differences = torch.tensor(
            [
                (
                    8 * (loss_at(i, step) - loss_at(i, -step))
                    - loss_at(i, 2 * step)
                    + loss_at(i, -2 * step)
                )
                / (12 * step)
                for i in range(len(gates))
            ]
        )
    scale = float(differences.abs().max())
    precision = torch.finfo(torch.float64 if is_double else torch.float32).eps
    rounding = (
        18 / 12 * ULPS * precision * max(abs(float(value.detach())), 0.1) / step
    )  # 8+8+1+1 losses
    tolerance = rounding + 1e-4 * scale  # what is left of the curvature
    assert scale > 20 * tolerance
    assert float((gradient - differences).abs().max()) < tolerance
