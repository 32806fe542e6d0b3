# SPDX-License-Identifier: Apache-2.0
"""What every scoring method must do, whatever it measures."""

import math

import pytest
import torch

from test_mask_learning import PLANTED, noisy_model, planted_model, trainer_of

NAMES = [
    "elimination", "path", "price", "ila", "leave-one-out", "shapley", "update-norm",
    "gradient-norm", "fisher", "aletheia", "adalora", "lora-drop", "eva", "plop", "spectrum",
    "kappatune", "block-influence", "cka", "first", "last", "middle", "random",
]  # fmt: skip
FAST = {"mask_batches": 2, "permutations": 2, "mask_steps": 20}
FINDS_THE_UPDATE = [
    "elimination", "path", "price", "ila", "leave-one-out", "shapley", "update-norm", "lora-drop",
]  # fmt: skip
BY_BLOCK = ["aletheia", "block-influence", "cka", "first", "last", "middle"]
HAS_ERRORS = [
    "elimination", "path", "price", "ila", "leave-one-out", "shapley", "gradient-norm", "fisher",
    "aletheia", "lora-drop", "plop", "block-influence",
]  # fmt: skip


def options_of(method, **values):
    from keylayers.scores.methods import find_method
    from keylayers.scores.scoring_options import scoring_options

    own = find_method(method).option_names
    fast = {name: value for name, value in FAST.items() if name in own}
    return scoring_options(method, **fast | values)


def score(trainer, method, updates=None, on_step=None, **values):
    from keylayers.scores.score_modules import score_modules
    from keylayers.updates import adapter_updates

    updates = updates or adapter_updates(trainer.model)
    return score_modules(trainer, updates, options_of(method, **values), on_step)


def by_name(found):
    return dict(zip(found.module_names, found.scores, strict=True))


def test_the_table_names_every_method_once():
    from keylayers.scores.methods import methods

    assert list(methods()) == NAMES


@pytest.mark.parametrize("method", NAMES)
def test_each_module_gets_a_finite_score_and_nothing_is_left_changed(method):
    trainer = trainer_of(noisy_model())
    model = trainer.model
    trainer.train_dataset = trainer.train_dataset.select(range(8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: one.requires_grad for name, one in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    found = score(trainer, method)
    assert len(found.scores) == len(found.module_names) == 14
    assert found.module_names[0] == "model.layers.0.self_attn.q_proj"
    assert all(math.isfinite(value) for value in found.scores)
    assert found.unit
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert {name: one.requires_grad for name, one in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("method", NAMES)
def test_the_same_seed_gives_the_same_scores_bit_for_bit(method):
    first, second = (score(trainer_of(noisy_model()), method, mask_seed=3) for _ in range(2))
    assert first.scores == second.scores


@pytest.mark.parametrize("method", FINDS_THE_UPDATE)
def test_the_module_with_the_only_useful_update_is_first(method):
    values = by_name(score(trainer_of(planted_model()), method))
    assert max(values, key=values.get) == PLANTED
    assert sorted(values.values())[-2] < values[PLANTED]


@pytest.mark.parametrize("method", NAMES)
def test_scores_do_not_depend_on_the_order_of_the_updates(method):
    """The same module by module, whichever comes first."""
    if method in ("random", "shapley", "adalora"):
        pytest.skip("draws in the order of the updates")
    from keylayers.updates import adapter_updates

    found = []
    for step in (1, -1):
        trainer = trainer_of(noisy_model())
        found.append(by_name(score(trainer, method, adapter_updates(trainer.model)[::step])))
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", BY_BLOCK)
def test_methods_for_blocks_give_their_modules_one_score(method):
    values = by_name(score(trainer_of(noisy_model()), method))
    per_block = [
        {value for name, value in values.items() if f"layers.{i}." in name} for i in (0, 1)
    ]
    assert [len(one) for one in per_block] == [1, 1]
    if method != "middle":
        assert per_block[0] != per_block[1]


@pytest.mark.parametrize("method", NAMES)
def test_standard_errors_come_from_the_spread_of_batches(method):
    found = score(trainer_of(noisy_model()), method)
    assert (found.standard_errors is not None) == (method in HAS_ERRORS)
    if found.standard_errors is not None:
        assert len(found.standard_errors) == 14
        assert all(error >= 0 for error in found.standard_errors)
        assert any(error > 0 for error in found.standard_errors)


def test_passes_are_counted():
    trainer = trainer_of(noisy_model())
    one_out = score(trainer, "leave-one-out")
    assert (one_out.num_forward, one_out.num_backward) == (15 * 2, 0)
    assert score(trainer, "shapley").forward_equivalents == 15 * 2
    learned = score(trainer, "ila")
    assert (learned.num_forward, learned.num_backward) == (20, 20)
    whole = score(trainer, "path", path_points=3)
    assert (whole.num_forward, whole.num_backward) == (3 * 2 + 2 * 2, 3 * 2)
    rounds = [14, 10, 7, 5, 4]
    assert score(trainer, "elimination").forward_equivalents == 2 * 2 * len(rounds)
    assert score(trainer, "spectrum").forward_equivalents == 0


@pytest.mark.parametrize("method", NAMES)
def test_progress_knows_how_many_steps_a_method_reports(method):
    trainer, seen = trainer_of(noisy_model()), []
    score(trainer, method, on_step=lambda step, loss: seen.append(step))
    assert seen == list(range(1, len(seen) + 1))
    expected = options_of(method).num_steps(14)
    assert expected in (len(seen), None)
    assert (expected is None) == (not seen)


FOREIGN = [
    (
        {"method": "random", "mask_batches": 8},
        "`mask_batches` must be left out with `method` random",
    ),
    ({"method": "elimination", "path_points": 8}, "`path_points` must be left out"),
    ({"method": "elimination", "mask_steps": 8}, "`mask_steps` must be left out"),
    ({"method": "fisher", "granularity": "block"}, "`granularity` must be left out"),
    ({"method": "ila", "price": 1.0}, "`price` must be left out with `method` ila"),
    (
        {"method": "elimination", "keep_fraction": 1.0},
        "`keep_fraction` must be above 0 and below 1",
    ),
    ({"method": "price", "price": -1.0}, "`price` must be from 0 to"),
    ({"method": "shapley", "permutations": 0}, "`permutations` must be at least 1"),
]


@pytest.mark.parametrize(("values", "message"), FOREIGN)
def test_an_option_without_effect_or_out_of_range_is_refused(values, message):
    from keylayers.errors import ConfigError
    from keylayers.scores.scoring_options import scoring_options

    with pytest.raises(ConfigError, match=message):
        scoring_options(**values)
