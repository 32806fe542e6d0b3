# SPDX-License-Identifier: Apache-2.0
"""Methods that integrate the gates' gradient: `path`, and the rounds of the default method."""

import pytest
import torch

from keylayers.scores.elimination import best
from keylayers.scores.options import EliminationOptions
from scored import PLANTED, batches_of, by_name, data, noisy, planted, score, slopes_of


def test_a_planted_module_carries_the_whole_loss_reduction_and_more_points_err_less():
    errors = []
    for points in (1, 2, 8, 16):
        found = score(planted(), "path", path_points=points)
        reduction, total = (
            found.findings[name] for name in ("loss_reduction_nats", "sum_of_scores_nats")
        )
        assert reduction > 0.05
        assert sum(found.scores) == pytest.approx(total, rel=1e-5)
        errors.append(abs(total - reduction))
    assert errors[0] > 3 * errors[1] > 3 * errors[2]
    assert by_name(found)[PLANTED] == pytest.approx(reduction, rel=1e-3)


def test_path_agrees_with_slopes_of_a_model_written_out():
    """Independently: trapezoids over the diagonal."""
    found = score(noisy(), "path", mask_batches=1, path_points=64, mask_seed=3)
    assert found.standard_errors is None  # they need two batches
    (batch,) = batches_of(noisy(), 1, seed=3)
    points = torch.linspace(0, 1, 161)
    slopes = torch.stack([slopes_of(point.expand(14), batch) for point in points])
    expected = -torch.trapezoid(slopes, points, dim=0)
    assert expected.abs().max() > 1e-3
    assert found.scores == pytest.approx(expected.tolist(), abs=3e-4)


ROUND_SIZES = [
    (56, 0.7, [56, 39, 27, 19, 13, 9, 6, 4]),
    (56, 0.5, [56, 28, 14, 7, 4]),
    (6, 0.99, [6, 5, 4]),  # every round drops at least one
    (9, 0.01, [9, 1]),
    (3, 0.7, [3]),
]


@pytest.mark.parametrize(("num_gates", "keep_fraction", "sizes"), ROUND_SIZES)
def test_the_sizes_of_the_rounds_by_hand(num_gates, keep_fraction, sizes):
    assert EliminationOptions(keep_fraction=keep_fraction).round_sizes(num_gates) == sizes


def test_elimination_agrees_with_the_definition_written_out():
    """Independently: rounds as in the formula."""
    found = score(noisy(), "elimination", mask_batches=2, keep_fraction=0.5)
    batches = batches_of(noisy(), 6)
    # Gauss-Legendre with two points on (0, 1)
    points = [0.5 - 3**-0.5 / 2, 0.5 + 3**-0.5 / 2]
    alive, total = list(range(14)), torch.zeros(14)
    for size, pair in zip((14, 7, 4), (batches[:2], batches[2:4], batches[4:]), strict=True):
        if size < 14:
            alive = sorted(alive, key=lambda gate: -shares[gate])[:size]
        open_gates, shares = torch.zeros(14), torch.zeros(14)
        open_gates[alive] = 1.0
        for point, batch in zip(points, pair, strict=True):
            shares -= open_gates * slopes_of(point * open_gates, batch) / 2
        total += shares / 3
    assert list(found.scores) == pytest.approx(total.tolist(), abs=1e-6)
    assert [one["num_modules"] for one in found.findings["rounds"]] == [14, 7, 4]


def test_a_round_sums_to_what_its_modules_achieve_together(monkeypatch):
    trainer = planted()
    monkeypatch.setattr(trainer, "train_dataset", data(4))  # every round sees the same batch
    found = score(trainer, "elimination", mask_batches=12)
    batch, model = next(iter(trainer.get_train_dataloader())), trainer.model
    with torch.no_grad(), model.disable_adapter():
        reduction = model(**batch).loss.item()
    with torch.no_grad():
        reduction -= model(**batch).loss.item()
    sums = [one["loss_reduction_nats"] for one in found.findings["rounds"]]
    assert [*sums, by_name(found)[PLANTED]] == pytest.approx([reduction] * 6, rel=1e-3)


def test_of_two_modules_that_stand_in_for_each_other_one_is_kept_late():
    """Twins share the credit of a path; elimination drops one and pays the other."""
    scores = torch.tensor([0.5, 0.5, 0.4, 0.1])
    assert best(scores, torch.ones(4), 2).tolist() == [1, 1, 0, 0]
    assert best(scores, torch.tensor([1.0, 0, 1, 1]), 2).tolist() == [1, 0, 1, 0]
    assert best(scores, torch.ones(4), 1).tolist() == [1, 0, 0, 0]  # ties in the gates' order
