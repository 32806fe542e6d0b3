# SPDX-License-Identifier: Apache-2.0
"""Options of a study: each refused when it is planned, as its command would refuse it later."""

import re
from dataclasses import MISSING, fields
from types import NoneType
from typing import get_args

import pytest
import yaml

from commands import keylayers

BASE = {"model": "m", "data": "d"}


def study(tmp_path, *more, **content):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return keylayers("study", path, "--output", tmp_path / "out", "--dry-run", *more)


# Options beside `model` and `data` -> what is said.
REFUSED = [
    ({"points": "abc"}, "`points` must be a whole number, got 'abc'"),
    ({"random_orders": [1, 2]}, r"`random_orders` must be a whole number, got \[1, 2\]"),
    ({"max_steps": 2.5}, "`max_steps` must be a whole number, got 2.5"),
    ({"seed": True}, "`seed` must be a whole number, got True"),
    ({"max_steps": 10**400}, "`max_steps` must be a whole number, got 1000"),
    ({"epsilon": "inf"}, "`epsilon` must be a finite number, got 'inf'"),
    ({"load_in_4bit": "yes"}, "`load_in_4bit` must be true or false, got 'yes'"),
    ({"revision": {"a": 1}}, "`revision` must be a text"),
    ({"budget": 0.3, "train_max_length": "abc"}, "`train_max_length` must be a whole number"),
    ({"budget": 0.3, "train_held_out": ".5x"}, "`train_held_out` must be a finite number"),
    ({"budget": 0.3, "controls": ["foo"]}, "`controls` must be one of .*, got 'foo'"),
    ({"budget": 0.3, "controls": 5}, "`controls` must be one of .*, got 5"),
    (
        {"budget": "2x-time"},
        "`budget` as a fraction of the cost of a step must be .* '2x-time'",
    ),
    ({"budget": "abcx-params"}, "`budget` must be a fraction such as .* 'abcx-params'"),
    ({"budget": 1.5}, "`budget` as a fraction must be above 0 and at most 1, got 1.5"),
    ({"budget": 0}, "`budget` as a count must be at least 1, got 0"),
    ({"budget": True}, "`budget` must be a text, got True"),
    ({"points": 1}, "`points` must be at least 2, got 1"),
    ({"lora-rank": 4, "lora_rank": 8}, "got 'lora_rank' twice, with - and with _"),
    ({"rank_first": True, "train_data": "other"}, "`train_data` .* left out with `rank_first`"),
    ({"rank_first": True, "update": "full"}, "`update` must be an adapter with `rank_first`"),
    (
        {"budget": 0.3, "max_examples": 100, "train_max_examples": None},
        "`train_max_examples` of a study must have a value, got null",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_an_option_that_fails_later_is_one_line_now(tmp_path, capsys, options, message):
    assert study(tmp_path, options=BASE | options) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert len(error.splitlines()) == 1


# What is beside options with a budget -> what is said.
OTHER_PARTS = [
    ({"evaluate": {"batch_size": 4}}, "something must be measured"),
    ({"evaluate": {"tasks": ["mmlu"], "limit": "few"}}, "`limit` must be a whole number"),
    ({"grid": {"budget": ["auto"]}, "verify": False}, "must not be false with `budget` auto"),
]


@pytest.mark.parametrize(("parts", "message"), OTHER_PARTS)
def test_parts_that_cannot_be_together_are_one_line(tmp_path, capsys, parts, message):
    assert study(tmp_path, options=BASE | {"budget": 0.3}, **parts) == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_evaluation_of_nothing_is_refused(tmp_path, capsys):
    assert study(tmp_path, options=BASE, evaluate={"tasks": ["mmlu"]}) == 2
    assert "must be left out where nothing is trained" in capsys.readouterr().err


# What a study has beside a model and data -> the option that no cell of it takes.
WITHOUT_EFFECT = [
    ({"options": {**BASE, "points": 4}, "verify": False}, "points"),
    ({"options": BASE, "grid": {"order_seed": [0, 1]}, "verify": False}, "order_seed"),
    ({"options": {**BASE, "train_data": "other"}}, "train_data"),
    ({"options": {**BASE, "steps": 100}}, "steps"),
    ({"options": {**BASE, "controls": ["random"]}}, "controls"),
    ({"options": {**BASE, "rank_first": True, "random_orders": 2}}, "random_orders"),
]


@pytest.mark.parametrize(("parts", "name"), WITHOUT_EFFECT)
def test_an_option_that_no_cell_takes_is_refused(tmp_path, capsys, parts, name):
    assert study(tmp_path, **parts) == 2
    assert f"takes `{name}`; leave it out" in capsys.readouterr().err
    if "rank_first" not in parts["options"]:
        options = {**parts["options"], "budget": 0.3}
        assert study(tmp_path, **parts | {"options": options, "verify": True}) == 0


def test_no_axis_is_named_as_a_column_of_the_results(tmp_path, capsys):
    from keylayers.commands.study.cell_options import KNOWN
    from keylayers.commands.study.files import COLUMNS

    named = ("kind", "status", "measure", "value", "cell", "unit")
    of_agreement = ("differs", "first", "second", "best", "jaccard", "chance_jaccard", "tau")
    assert {*named, *of_agreement, "top_weighted_tau", "mean", "runs"} <= set(COLUMNS)
    assert not set(COLUMNS) & set(KNOWN)
    for axis in COLUMNS:
        assert study(tmp_path, options=BASE, grid={axis: [{"name": "a", "seed": 0}]}) == 2
        assert f"got '{axis}'; name it otherwise" in capsys.readouterr().err


def test_a_setting_that_entries_of_the_grid_give_is_refused(tmp_path, capsys):
    grid = {"data": [{"name": "D", "data": "d", "max-steps": 320}], "seed": [0]}
    parts = {"options": {"model": "m"}, "grid": grid}
    for more in (("max_steps=10",), ("seed=1", "max-steps=10")):
        assert study(tmp_path, "--set", *more, **parts) == 2
        assert "but those of 'data' give 'max" in capsys.readouterr().err
    assert study(tmp_path, "--set", "max_steps=10", "data=[d]", **parts) == 0


def test_an_option_is_the_same_in_every_class_that_has_it():
    """Cells take the type and the default of an option by its name alone."""
    from keylayers.commands.study.cell_options import CLASSES

    found = {}
    for part in CLASSES:
        for one in fields(part):
            found.setdefault(one.name, []).append(one)
    assert {"seed", "batch_size", "held_out", "data"} <= {
        name for name, same in found.items() if len(same) > 1
    }
    for name, same in found.items():
        assert len({str(without_none(one.type)) for one in same}) == 1, name
        # data of trainings must be given, and then its default decides nothing
        defaults = {one.default for one in same} - {MISSING}
        assert len(defaults) <= 1, name


def without_none(kind):
    parts = [one for one in get_args(kind) if one is not NoneType]
    return parts[0] if NoneType in get_args(kind) else kind
