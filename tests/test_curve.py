# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch
from datasets import Dataset

from keylayers.evaluation.held_out import held_out_loss, mask_curve
from keylayers.gates import gated
from keylayers.ranking.verification import MaskCurve
from keylayers.updates import adapter_updates
from scored import PLANTED, data, noisy_model, planted_model, trainer_of


def curve_of(counts, losses):
    return MaskCurve(counts=counts, losses=losses)


AREAS = [
    # heights 1, 0.25, 0 over counts 0, 1, 4: 1 * 0.625 + 3 * 0.125, over 4
    ((0, 1, 4), (3.0, 1.5, 1.0), 0.25, (4, 1.0)),
    ((0, 1, 2), (1.0, 1.0, 1.0), None, (0, 1.0)),
    ((0, 1, 2), (1.0, 0.5, 2.0), None, (1, 0.5)),
    ((0, 2, 4), (3.0, 1.0, 1.0), 0.25, (2, 1.0)),
]


@pytest.mark.parametrize(("counts", "losses", "area", "best"), AREAS)
def test_the_area_and_the_first_best_point_by_hand(counts, losses, area, best):
    curve = curve_of(counts, losses)
    assert (curve.normalised_area, curve.best) == (pytest.approx(area), best)
    shifted = curve_of(counts, tuple(loss + 8 for loss in losses))
    assert shifted.normalised_area == curve.normalised_area


def test_the_curve_of_a_planted_module_falls_when_it_enters():
    trainer = trainer_of(planted_model())
    updates = adapter_updates(trainer.model)
    others = [update.module.name for update in updates if update.module.name != PLANTED]
    first = mask_curve(trainer, updates, [PLANTED, *others], data())
    last = mask_curve(trainer, updates, [*others, PLANTED], data())
    base, low = first.losses[:2]
    assert first.counts == tuple(range(15))
    assert base > low
    assert first.losses == (base, *[low] * 14)
    assert last.losses == (*[base] * 14, low)


def paired_curve(differences, weights):
    """A curve whose points exceed its end by given amounts in each batch, then the end itself."""
    end = np.linspace(1.0, 4.0, len(weights))  # differs far more between batches than points do
    rows = [end + 2.0, *(end + np.array(one) for one in differences), end]
    return MaskCurve(
        counts=tuple(np.linspace(0, 6, len(rows), dtype=int).tolist()),
        losses=tuple(float(np.average(row, weights=weights)) for row in rows),
        batch_losses=tuple(tuple(row.tolist()) for row in rows),
        batch_weights=tuple(map(float, weights)),
    )


NOISY = (-0.9, 0.8, -0.7, 0.9, -0.8, 0.7, -0.6, 0.8)  # mean 0.025
# 2 modules are within 0.25 at the point only, 4 surely
TWO_POINTS = paired_curve([NOISY, (0.125,) * 8], [1.0] * 8)
EQUAL = paired_curve([(0.125,) * 4], [3.0, 1.0, 2.0, 5.0])
ONE_BATCH = paired_curve([(0.125,)], [7.0])
# curve, margin -> recommended modules, their difference from all and its upper limit
WITHIN = [
    (TWO_POINTS, 0.25, 4, 0.125, 0.125),
    (TWO_POINTS, 0.0, 6, 0, 0),
    (EQUAL, 1.0, 3, 0.125, 0.125),
    (ONE_BATCH, 1.0, 3, 0.125, 0.125),
    (curve_of((0, 3, 6), (3.0, 1.125, 1.0)), 0.125, 3, 0.125, 0.125),
    (curve_of((0, 3, 6), (1.0, 1.0, 1.0)), 0.5, 3, 0, 0),
]


@pytest.mark.parametrize(("curve", "margin", "count", "difference", "upper"), WITHIN)
def test_the_smallest_budget_surely_within_the_margin(curve, margin, count, difference, upper):
    found = curve.smallest_within(margin)
    assert (found.num_modules, found.margin_nats) == (count, margin)
    assert (found.difference_nats, found.upper_nats) == pytest.approx((difference, upper))


def test_the_upper_limit_is_that_of_an_independent_bootstrap_of_weighted_batches():
    generator = np.random.default_rng(3)
    differences = generator.normal(0.05, 0.2, size=12)
    weights = generator.integers(20, 90, size=12)
    curve = paired_curve([differences], weights)
    one = curve.smallest_within(10.0)
    picks = generator.integers(0, 12, size=(100_000, 12))
    means = (differences[picks] * weights[picks]).sum(1) / weights[picks].sum(1)
    assert one.num_modules == 3
    assert one.difference_nats == pytest.approx(np.average(differences, weights=weights))
    assert one.upper_nats > one.difference_nats
    # 9999 resamples know this quantile to 2 % of the spread
    assert one.upper_nats == pytest.approx(np.quantile(means, 0.95), abs=0.1 * means.std())
    assert curve.smallest_within(10.0) == one


def token_mean(model, rows, labels):
    """About the mean loss over all labelled tokens, one row at a time."""
    with torch.no_grad():
        logits = torch.cat([model(input_ids=torch.tensor([row])).logits[0, :-1] for row in rows])
    targets = torch.tensor([label for row in labels for label in row[1:]])
    return pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), rel=1e-5)


@pytest.mark.parametrize("counts", [(0, 14), (0, 4, 7, 10, 14)])
def test_the_ends_of_the_curve_are_the_mean_losses_with_gates_closed_and_open(counts):
    trainer = trainer_of(noisy_model())
    updates = adapter_updates(trainer.model)
    names = [update.module.name for update in updates]
    rows = data(10)["input_ids"]
    labels = [row[:6] + [-100] * 6 for row in rows[:3]] + rows[3:]
    held_out = Dataset.from_dict({"input_ids": rows, "labels": labels})
    seen = []
    options = {"num_points": len(counts), "on_step": lambda *step: seen.append(step)}
    curve = mask_curve(trainer, updates, names, held_out, **options)
    assert trainer.model.training
    trainer.model.eval()
    for index, value in ((0, 0.0), (-1, 1.0)):
        with gated(trainer.model, updates, initial_score=value, link="identity"):
            assert curve.losses[index] == held_out_loss(trainer, held_out)
            assert curve.losses[index] == token_mean(trainer.model, rows, labels)
    assert curve.losses[-1] == token_mean(trainer.model, rows, labels)
    assert curve.counts == counts
    assert len(curve.losses) == len(curve.batch_losses) == len(counts)
    assert seen == list(enumerate(curve.losses, start=1))
    assert sum(curve.batch_weights) == sum(label != -100 for row in labels for label in row[1:])
    assert len(set(curve.batch_weights)) > 1
    for loss, row in zip(curve.losses, curve.batch_losses, strict=True):
        assert loss == pytest.approx(np.average(row, weights=curve.batch_weights), rel=1e-6)
