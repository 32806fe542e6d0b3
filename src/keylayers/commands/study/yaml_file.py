# SPDX-License-Identifier: Apache-2.0
"""A study file: options of every run, a grid of those that differ, and what is measured."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from keylayers.errors import ConfigError, did_you_mean
from keylayers.yaml_values import yaml_value

PARTS = ("options", "grid", "verify", "compare", "evaluate")
MOST_COMBINATIONS = 10_000  # each is a run
PATHS = ("model", "data", "train_model", "train_data")  # tables show the last part of the name


@dataclass(frozen=True)
class AxisPoint:
    """One entry of an axis of the grid.

    Attributes:
        label: What tables call it.
        options: The options that it gives.
    """

    label: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class StudyFile:
    """What a study file asks for.

    Attributes:
        options: Options of every cell, by the names of their flags.
        grid: Axis -> its entries; every combination is run.
        verify: Measure the mask curve of every ranking.
        compare: Budgets at which the rankings are compared with each other; none: they are not.
        evaluate: Options of `keylayers eval` for all that is trained; none: it is not evaluated.
    """

    options: Mapping[str, Any]
    grid: Mapping[str, tuple[AxisPoint, ...]]
    verify: bool = True
    compare: tuple[float, ...] = ()
    evaluate: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(content: Mapping[str, Any], source: str) -> "StudyFile":
        """A study file from what its YAML holds.

        Args:
            content: Its mapping.
            source: What messages call it.

        Raises:
            ConfigError: a part is unknown, missing or of the wrong kind.
        """
        for key in content:
            if key not in PARTS:
                raise ConfigError(
                    f"a study file must hold {', '.join(PARTS[:-1])} and {PARTS[-1]} and nothing "
                    f"else, but {source} has {key!r}{did_you_mean(str(key), PARTS)}"
                )
        parts = {name: _part(content, name) for name in ("options", "grid", "evaluate")}
        for name, part in parts.items():
            if not isinstance(part, dict):
                raise ConfigError(
                    f"`{name}` of a study must map names to values, but in {source} it is a "
                    f"{type(part).__name__}"
                )
        verify = content.get("verify", True)
        if not isinstance(verify, bool):
            raise ConfigError(f"`verify` of a study must be true or false, got {verify!r}")
        axes = {axis: _axis(axis, points) for axis, points in _options(parts["grid"]).items()}
        if (num := math.prod(map(len, axes.values()))) > MOST_COMBINATIONS:
            raise ConfigError(
                f"the grid of a study must have at most {MOST_COMBINATIONS:,} combinations, but "
                f"that of {source} has {num:,}; make several studies of it"
            )
        return StudyFile(
            options=_options(parts["options"]),
            grid=axes,
            verify=verify,
            compare=_budgets(content.get("compare")),
            evaluate=_options(parts["evaluate"]),
        )


def with_settings(content: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """What a study file holds, with some of its options given anew.

    An axis of the grid is given its entries, as a list or one alone; anything else is an option of
    every run.

    Args:
        content: Of the study file.
        settings: `name=value`, the value in YAML.

    Raises:
        ConfigError: a setting has no name, its value is no YAML, or entries of the grid, which win
            over options of every run, give what it names.
    """
    options, grid = _part(content, "options"), _part(content, "grid")
    if not settings or not isinstance(options, dict) or not isinstance(grid, dict):
        return dict(content)  # what is no mapping is refused as it is
    options = dict(options)
    grid = {_normal(axis): points for axis, points in grid.items()}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not name:
            raise ConfigError(f"`set` must be name=value, such as seed=3, got {setting!r}")
        value = yaml_value(text, f"the value of `set` for {name}")
        if _normal(name) in grid:
            grid[_normal(name)] = value if isinstance(value, list) else [value]
        else:
            options[name] = value
    for setting in settings:
        _check_has_effect(setting.partition("=")[0], grid)
    return {**content, "options": options, "grid": grid}


def _check_has_effect(name: str, grid: Mapping[str, Any]) -> None:
    """Refuse a setting of an option that an entry of the grid gives in every case."""
    for axis, points in grid.items():
        entries = points if isinstance(points, list) and _normal(name) != axis else []
        if any(_normal(name) in map(_normal, one) for one in entries if isinstance(one, dict)):
            raise ConfigError(
                f"`set` must name an axis of the grid, or an option that none of its entries "
                f"gives, but those of {axis!r} give {name!r}; give the axis anew, or edit the file"
            )


def _part(content: Mapping[str, Any], name: str) -> Any:
    """What stands under a name; an empty mapping where nothing does."""
    part = content.get(name)
    return {} if part is None else part


def _budgets(given: Any) -> tuple[float, ...]:
    budgets = [] if given is None else given
    is_list = isinstance(budgets, list)
    if not is_list or not all(isinstance(one, float) and 0 < one < 1 for one in budgets):
        raise ConfigError(
            f"`compare` of a study must be a list of shares of the modules, such as [0.3, 0.75], "
            f"got {given!r}"
        )
    return tuple(budgets)


def _axis(axis: str, points: Any) -> tuple[AxisPoint, ...]:
    if not isinstance(points, list) or not points:
        raise ConfigError(
            f"every axis of a study's grid must be a list with an entry at least, but {axis!r} is "
            f"{points!r}"
        )
    found = tuple(_point(axis, one) for one in points)
    labels = [one.label for one in found]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(f"every entry of an axis must be another, but {axis!r} has {twice} twice")
    return found


def _point(axis: str, one: Any) -> AxisPoint:
    if isinstance(one, dict):
        options = _options(one)
        label = options.pop("name", None)
        own = [str(options[axis])] if axis in options else []  # its own name says nothing more
        words = own + [f"{name} {value}" for name, value in options.items() if name != axis]
        return AxisPoint(visible(", ".join(words) if label is None else label), options)
    label = Path(one).name if isinstance(one, str) and axis in PATHS else one
    return AxisPoint(visible(label), {axis: one})


def _options(options: Mapping[Any, Any]) -> dict[str, Any]:
    """Options, or axes of the grid, by the names of their flags."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        if _normal(name) in found:
            raise ConfigError(
                f"every name in a study file must stand once where it stands, got {name!r} twice, "
                f"with - and with _"
            )
        found[_normal(name)] = value
    return found


def _normal(name: Any) -> str:
    return visible(name).replace("-", "_")


def visible(text: Any) -> str:
    """A text of somebody else without what a terminal would obey."""
    return "".join(one if one.isprintable() else "\ufffd" for one in str(text))
