# SPDX-License-Identifier: Apache-2.0
"""What every scoring method must do, whatever it measures: one run per method, then variations."""

import math
from functools import cache

import pytest
from datasets import Dataset

from keylayers.errors import ConfigError
from keylayers.scores.methods import methods
from keylayers.scores.scoring_options import scoring_options
from keylayers.updates import adapter_updates
from scored import (
    PLANTED,
    by_name,
    eight_rows,
    everything,
    noisy,
    options_of,
    planted,
    score,
    scores_of,
)

from tiny_models import unchanged

NAMES = [
    "elimination", "path", "price", "fisher-pruning", "ila", "leave-one-out", "shapley",
    "update-norm", "gradient-norm", "gradient-path", "fisher", "aletheia", "adalora", "lora-drop",
    "eva", "plop", "spectrum", "kappatune", "block-influence", "cka", "first", "last", "middle",
    "random",
]  # fmt: skip
NO_DATA = ["update-norm", "spectrum", "kappatune", "first", "last", "middle", "random"]
FINDS_THE_UPDATE = [
    "elimination", "path", "price", "fisher-pruning", "ila", "leave-one-out", "shapley",
    "update-norm", "lora-drop",
]  # fmt: skip
BY_BLOCK = ["aletheia", "block-influence", "cka", "first", "last", "middle"]
HAS_ERRORS = [
    "elimination", "path", "price", "ila", "leave-one-out", "shapley", "gradient-norm",
    "gradient-path", "fisher", "aletheia", "lora-drop", "plop", "block-influence",
]  # fmt: skip
# Means over examples or tokens. The others take a step, a point of a path or a step of a
# decomposition per batch.
MEANS = ["path", "leave-one-out", "fisher", "lora-drop", "plop", "block-influence", "cka"]
DRAWS_BY_MODULE = ["random", "shapley", "adalora"]
DOES_NOT_DEPEND_ON = {
    "order of modules": [name for name in NAMES if name not in DRAWS_BY_MODULE],
    "padding": [name for name in NAMES if name not in NO_DATA],
    "size of batches": MEANS,
    "order of batches": [*MEANS, "gradient-norm", "aletheia"],
}
# Passes forward and backward.
PASSES = {
    "leave-one-out": (15 * 2, 0),
    "shapley": (15 * 2, 0),
    "ila": (20, 20),
    "path": (4 * 2 + 2 * 2, 4 * 2),
    "gradient-path": (5 * 2, 5 * 2),
    "elimination": (2 * 5, 2 * 5),  # rounds of 14, 10, 7, 5 and 4 modules
    "fisher-pruning": (2 * 5, 2 * 5),
    "spectrum": (0, 0),
}


@cache
def found_by(method):
    return score(eight_rows(), method)


def test_the_table_names_every_method_once():
    assert list(methods()) == NAMES


@pytest.mark.parametrize("method", NAMES)
def test_every_module_is_scored_steps_are_reported_and_nothing_is_left_changed(method):
    trainer, steps = eight_rows(), []
    with unchanged(trainer, everything):
        found = score(trainer, method, on_step=lambda step, loss: steps.append(step))
    assert len(found.scores) == len(found.module_names) == 14
    assert found.module_names[0] == "model.layers.0.self_attn.q_proj"
    assert all(map(math.isfinite, found.scores))
    assert found.unit
    again = found_by(method)
    assert (again.scores, again.losses) == (found.scores, found.losses)

    assert steps == list(range(1, len(steps) + 1))
    assert options_of(method).num_steps(14) == (len(steps) or None)

    if method in PASSES:
        assert (found.num_forward, found.num_backward) == PASSES[method]
        assert found.forward_equivalents == sum(PASSES[method])
    errors = found.standard_errors
    assert (errors is not None) == (method in HAS_ERRORS)
    if errors is not None:
        assert len(errors) == 14
        assert 0 <= min(errors) < max(errors)


@pytest.mark.parametrize("method", BY_BLOCK)
def test_methods_for_blocks_give_their_modules_one_score(method):
    first, second = (set(found_by(method).scores[start:][:7]) for start in (0, 7))
    assert len(first) == len(second) == 1
    assert (first == second) == (method == "middle")


def padded(rows, num_tokens):
    """The same rows with padding that neither attention nor the loss sees."""
    columns = {"input_ids": (rows["input_ids"], 0), "labels": (rows["labels"], -100)}
    columns["attention_mask"] = ([[1] * len(row) for row in rows["labels"]], 0)
    return Dataset.from_dict(
        {name: [row + [pad] * num_tokens for row in held] for name, (held, pad) in columns.items()}
    )


@pytest.mark.parametrize(
    ("change", "method"),
    [(change, method) for change, methods in DOES_NOT_DEPEND_ON.items() for method in methods],
)
def test_scores_do_not_depend_on(change, method, monkeypatch):
    trainer, first = eight_rows(), found_by(method)
    if change == "order of modules":
        second = score(trainer, method, adapter_updates(trainer.model)[::-1])
    elif change == "padding":
        monkeypatch.setattr(trainer, "train_dataset", padded(trainer.train_dataset, 7))
        second = score(trainer, method)
    elif change == "size of batches":
        monkeypatch.setattr(trainer, "_train_batch_size", 2)
        second = score(trainer, method, mask_batches=4)
    else:
        monkeypatch.setattr(trainer, "_train_batch_size", 1)
        first, second = (score(trainer, method, mask_batches=8, mask_seed=seed) for seed in (0, 1))
    assert by_name(first) == pytest.approx(by_name(second), rel=1e-4, abs=1e-6)
    if change in ("size of batches", "order of batches") and first.losses:
        assert first.losses != second.losses  # the change was one


@pytest.mark.parametrize("method", FINDS_THE_UPDATE)
def test_the_module_with_the_only_useful_update_is_first(method):
    values = scores_of(planted(), method)
    best = values.pop(PLANTED)
    assert len(set(values.values())) == 1  # updates of zero change no loss
    assert best > max(values.values())


GROUPED = [("elimination", "projection", 7), ("elimination", "block", 2), ("ila", "block", 2)]


@pytest.mark.parametrize(("method", "granularity", "num_gates"), GROUPED)
def test_modules_that_share_a_gate_share_its_score(method, granularity, num_gates):
    values = scores_of(eight_rows(), method, granularity=granularity)
    part = {"block": 2, "projection": -1}[granularity]  # of a module's name
    found = {(name.split(".")[part], value) for name, value in values.items()}
    assert len(found) == len(set(values.values())) == num_gates


REFUSED = [
    ("random", {"mask_batches": 8}, "`mask_batches` must be left out with `method` random"),
    ("elimination", {"path_points": 8}, "`path_points` must be left out with `method` elim"),
    ("elimination", {"mask_steps": 8}, "`mask_steps` must be left out"),
    ("fisher", {"granularity": "block"}, "`granularity` must be left out"),
    ("ila", {"price": 1.0}, "`price` must be left out with `method` ila"),
    ("path", {"mask_optimizer": "adam"}, "`mask_optimizer` must be left out"),
    ("update-norm", {"until_stable": 0.3}, "must be left out with `method` update-norm"),
    ("path", {"path_point": 3}, "must be an option of `method` path, .*mean 'path_points'?"),
    ("ilo", {}, "`method` must be one of elimination, .*got 'ilo', did you mean 'ila'?"),
    ("elimination", {"keep_fraction": 1.0}, "`keep_fraction` must be above 0 and below 1"),
    ("elimination", {"until_stable": 1.0}, "`until_stable` must be above 0 and below 1"),
    ("elimination", {"mask_seed": -1}, "`mask_seed` must be from 0 to"),
    ("path", {"mask_batches": 0}, "`mask_batches` must be at least 1"),
    ("shapley", {"permutations": 0}, "`permutations` must be at least 1"),
    ("adalora", {"mask_steps": 1}, "`mask_steps` must be at least 2, got 1"),
    ("price", {"price": -1.0}, r"`price` must be from 0 to 1e\+06 nats, got -1"),
    ("price", {"price": math.inf}, r"from 0 to 1e\+06 nats, got inf"),
    ("ila", {"initial_score": 1e39}, "`initial_score` must be from -20 to 20"),
    ("ila", {"initial_score": math.nan}, "`initial_score` must be from -20 to"),
    ("ila", {"mask_learning_rate": 0.0}, "`mask_learning_rate` must be above 0"),
]


@pytest.mark.parametrize(("method", "values", "message"), REFUSED)
def test_an_option_without_effect_or_out_of_range_is_refused(method, values, message):
    with pytest.raises(ConfigError, match=message):
        scoring_options(method, **values)


def test_gradient_path_is_the_sum_of_two_shares():
    values = {name: score(noisy(), name) for name in ("gradient-norm", "path", "gradient-path")}
    shares = [
        [one / sum(map(abs, values[name].scores)) for one in values[name].scores]
        for name in ("gradient-norm", "path")
    ]
    assert values["gradient-path"].scores == pytest.approx(
        list(map(sum, zip(*shares, strict=True)))
    )
