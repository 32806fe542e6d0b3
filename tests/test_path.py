# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from test_mask_learning import PLANTED, data, noisy_model, planted_model, trainer_of


def score(trainer, **values):
    from keylayers.scores.score_modules import score_modules
    from keylayers.scores.scoring_options import scoring_options
    from keylayers.updates import adapter_updates

    options = scoring_options(**{"method": "path", "mask_batches": 2, "path_points": 8} | values)
    return score_modules(trainer, adapter_updates(trainer.model), options)


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
    from keylayers.gates import gated
    from keylayers.updates import adapter_updates

    trainer = trainer_of(noisy_model(), seed=3)
    result = score(trainer, mask_batches=1, path_points=64)
    torch.manual_seed(0)
    from transformers import set_seed

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


def test_the_same_seed_gives_the_same_scores_bit_for_bit():
    first, second = (score(trainer_of(noisy_model())) for _ in range(2))
    assert first.scores == second.scores
    assert score(trainer_of(noisy_model()), mask_seed=9).scores != first.scores


def test_the_model_is_given_back():
    trainer = trainer_of(noisy_model())
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    score(trainer)
    after = trainer.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_standard_errors_need_two_batches():
    assert score(trainer_of(noisy_model()), mask_batches=1).standard_errors is None
    errors = score(trainer_of(noisy_model()), mask_batches=4).standard_errors
    assert all(error > 0 for error in errors)
    assert len(data()) == 24


FOREIGN = [
    ({"method": "path", "mask_steps": 10}, "`mask_steps` must be left out with `method` path"),
    ({"method": "path", "mask_optimizer": "adam"}, "`mask_optimizer` must be left out"),
    ({"method": "path", "initial_score": 2.0}, "`initial_score` must be left out"),
    ({"method": "ila", "path_points": 3}, "`path_points` must be left out with `method` ila"),
    ({"mask_batches": 0}, "`mask_batches` must be at least 1"),
]


@pytest.mark.parametrize(("values", "message"), FOREIGN)
def test_options_of_the_other_method_are_refused(values, message):
    from keylayers.errors import ConfigError
    from keylayers.scores.scoring_options import scoring_options

    with pytest.raises(ConfigError, match=message):
        scoring_options(**values)
