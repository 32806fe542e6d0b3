# SPDX-License-Identifier: Apache-2.0
"""The default method: rounds of path integrals under a shrinking budget."""

from itertools import islice

import pytest
import torch
from transformers import set_seed

from keylayers.gates import gated
from keylayers.scores.elimination import _best
from keylayers.scores.options import EliminationOptions
from keylayers.trainers.loss import TrainerLoss
from keylayers.updates import adapter_updates
from scored import PLANTED, by_name, data, noisy_model, planted_model, score, trainer_of


def test_the_sizes_of_the_rounds_by_hand():
    def round_sizes(num_gates, keep_fraction):
        return EliminationOptions(keep_fraction=keep_fraction).round_sizes(num_gates)

    assert round_sizes(56, 0.7) == [56, 39, 27, 19, 13, 9, 6, 4]
    assert round_sizes(56, 0.5) == [56, 28, 14, 7, 4]
    assert round_sizes(6, 0.99) == [6, 5, 4]  # every round drops at least one
    assert round_sizes(9, 0.01) == [9, 1]
    assert round_sizes(3, 0.7) == [3]


def test_scores_agree_with_the_definition_written_out():
    """Independently: slopes by autograd on merged weights, rounds as in the formula."""
    trainer = trainer_of(noisy_model(), seed=3)
    found = score(trainer, "elimination", mask_batches=2, keep_fraction=0.5)

    set_seed(3)
    batches = list(islice(TrainerLoss(trainer).batches(trainer.args.seed), 6))
    # Gauss-Legendre with two points on (0, 1)
    points = [0.5 - 3**-0.5 / 2, 0.5 + 3**-0.5 / 2]
    alive, total = list(range(14)), torch.zeros(14)
    model = trainer.model
    with gated(model, adapter_updates(model), initial_score=0.0, link="identity") as gates:
        for size, pair in zip((14, 7, 4), (batches[:2], batches[2:4], batches[4:]), strict=True):
            if size < 14:
                alive = sorted(alive, key=lambda gate: -shares[gate])[:size]
            shares = torch.zeros(14)
            for point, batch in zip(points, pair, strict=True):
                values = torch.zeros(14)
                values[alive] = point
                gates.set_scores(values)
                loss = model(**batch).loss
                slopes = torch.autograd.grad(loss, gates.parameters())
                shares[alive] -= torch.cat(slopes)[alive] / 2
            total += shares / 3
    assert list(found.scores) == pytest.approx(total.tolist(), abs=1e-6)
    assert [one["num_modules"] for one in found.findings["rounds"]] == [14, 7, 4]


def test_a_round_sums_to_what_its_modules_achieve_together():
    trainer = trainer_of(planted_model())
    trainer.train_dataset = data(4)  # one batch, so that every round and point sees the same
    found = score(trainer, "elimination", mask_batches=12)
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model
    with torch.no_grad():
        tuned = model(**batch).loss.item()
        with model.disable_adapter():
            base = model(**batch).loss.item()
    for one in found.findings["rounds"]:
        assert one["loss_reduction_nats"] == pytest.approx(base - tuned, rel=1e-3)
    assert by_name(found)[PLANTED] == pytest.approx(base - tuned, rel=1e-3)


def test_of_two_modules_that_stand_in_for_each_other_one_is_kept_late():
    """Twins share the credit of a path; elimination drops one and pays the other."""

    scores = torch.tensor([0.5, 0.5, 0.4, 0.1])
    assert _best(scores, torch.ones(4), 2).tolist() == [1, 1, 0, 0]
    assert _best(scores, torch.tensor([1.0, 0, 1, 1]), 2).tolist() == [1, 0, 1, 0]
    assert _best(scores, torch.ones(4), 1).tolist() == [1, 0, 0, 0]  # ties in the gates' order


@pytest.mark.parametrize("granularity", ["block", "projection"])
def test_modules_that_share_a_gate_share_its_score(granularity):
    found = by_name(score(trainer_of(noisy_model()), "elimination", granularity=granularity))
    assert len(set(found.values())) == {"block": 2, "projection": 7}[granularity]
