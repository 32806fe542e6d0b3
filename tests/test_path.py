# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from transformers import set_seed

import scored
from keylayers.gates import gated
from keylayers.updates import adapter_updates
from scored import PLANTED, noisy_model, planted_model, trainer_of


def score(trainer, **values):
    return scored.score(trainer, "path", **{"path_points": 8} | values)


def test_scores_sum_to_the_loss_reduction():
    result = score(trainer_of(planted_model()), path_points=16)
    findings = result.findings
    assert findings["loss_reduction_nats"] > 0.05
    assert sum(result.scores) == pytest.approx(findings["sum_of_scores_nats"], rel=1e-5)
    assert sum(result.scores) == pytest.approx(findings["loss_reduction_nats"], rel=1e-3)


def test_more_points_leave_a_smaller_error():
    errors = []
    for points in (1, 2, 8):
        found = score(trainer_of(planted_model()), path_points=points).findings
        errors.append(abs(found["sum_of_scores_nats"] - found["loss_reduction_nats"]))
    assert errors[0] > 3 * errors[1] > 3 * errors[2]


def test_a_planted_module_carries_the_whole_reduction():
    result = score(trainer_of(planted_model()))
    by_name = dict(zip(result.module_names, result.scores, strict=True))
    assert by_name.pop(PLANTED) == pytest.approx(result.findings["loss_reduction_nats"], rel=1e-2)
    assert set(by_name.values()) == {0.0}


def test_scores_agree_with_differences_of_losses():
    """Independently: slopes on the diagonal by central differences, trapezoids over t."""

    trainer = trainer_of(noisy_model(), seed=3)
    result = score(trainer, mask_batches=1, path_points=64)
    torch.manual_seed(0)

    set_seed(3)
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model
    model.train()
    points = torch.linspace(0, 1, 41)
    slopes = []
    with gated(model, adapter_updates(model), initial_score=0.0, link="identity") as gates:
        for point in points:
            row = []
            for index in range(4):  # the first four modules
                losses = []
                for step in (0.02, -0.02):
                    values = torch.full((len(gates),), float(point))
                    values[index] += step
                    gates.set_scores(values)
                    with torch.no_grad():
                        losses.append(model(**batch).loss.double().item())
                row.append((losses[0] - losses[1]) / 0.04)
            slopes.append(row)
    expected = -torch.trapezoid(torch.tensor(slopes), points, dim=0)
    assert max(abs(value) for value in expected.tolist()) > 1e-3
    assert list(result.scores[:4]) == pytest.approx(expected.tolist(), abs=3e-4)


def test_standard_errors_need_two_batches():
    assert score(trainer_of(noisy_model()), mask_batches=1).standard_errors is None
    errors = score(trainer_of(noisy_model()), mask_batches=4).standard_errors
    assert all(error > 0 for error in errors)
