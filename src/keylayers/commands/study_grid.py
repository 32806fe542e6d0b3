# SPDX-License-Identifier: Apache-2.0
"""A study file: options that all runs share, a grid of options that differ, what is measured."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keylayers.errors import ConfigError, did_you_mean
from keylayers.yaml_values import yaml_value

PARTS = {"options": dict, "grid": dict, "verify": bool, "compare": list, "evaluate": dict}
MAX_COMBINATIONS = 10_000
PATHS = ("model", "data", "train_model", "train_data")  # tables show the last part of the path


@dataclass(frozen=True)
class Study:
    """What a study file asks for.

    Attributes:
        options: Options of every run, by the names of their flags (`lora_rank`).
        grid: Axis -> label of an entry -> the options that it sets.
        verify: Whether the mask curve of every ranking is measured.
        compare: Fractions of the modules at which rankings are compared; empty: no comparison.
        evaluate: Options of `keylayers eval` for everything that is trained; empty: no evaluation.
    """

    options: Mapping[str, Any]
    grid: Mapping[str, Mapping[str, Mapping[str, Any]]]
    verify: bool
    compare: Sequence[float]
    evaluate: Mapping[str, Any]

    def names_of(self, axis: str) -> set[str]:
        """The options that an axis sets."""
        return {name for options in self.grid[axis].values() for name in options}

    def combinations(self) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
        """For every combination of the grid: axis -> label, and all options that have a value."""
        for chosen in itertools.product(*(axis.items() for axis in self.grid.values())):
            options = dict(self.options)
            for _, own in chosen:
                options |= own
            point = {axis: label for axis, (label, _) in zip(self.grid, chosen, strict=True)}
            yield point, {name: value for name, value in options.items() if value is not None}


def read_study(content: Mapping[str, Any], source: str, settings: Sequence[str] = ()) -> Study:
    """A study from the mapping that the YAML file `source` holds.

    `settings` are `name=value`, as `--set` takes them.
    """
    for name, part in content.items():
        if name not in PARTS:
            raise ConfigError(
                f"a study file must hold {', '.join(PARTS)} and nothing else, but {source} has "
                f"{name!r}{did_you_mean(name, PARTS)}"
            )
        if part is not None and not isinstance(part, PARTS[name]):
            raise ConfigError(
                f"`{name}` of a study must be a {PARTS[name].__name__}, but in {source} it is a "
                f"{type(part).__name__}"
            )
    parts = (_normalised(content.get(name) or {}) for name in ("options", "grid", "evaluate"))
    options, grid, evaluate = parts
    axes = {axis: _entries(axis, values) for axis, values in grid.items()}
    for setting in settings:
        _apply(setting, options, axes)
    compare = content.get("compare") or []
    if not all(isinstance(fraction, float) and 0 < fraction < 1 for fraction in compare):
        raise ConfigError(f"`compare` of a study must be like [0.3, 0.75], got {compare!r}")
    if (count := math.prod(map(len, axes.values()))) > MAX_COMBINATIONS:
        raise ConfigError(
            f"the grid of a study must have at most {MAX_COMBINATIONS:,} combinations, but that of "
            f"{source} has {count:,}; split it into several studies"
        )
    return Study(options, axes, content.get("verify") is not False, compare, evaluate)


def _apply(
    setting: str, options: dict[str, Any], axes: dict[str, dict[str, Mapping[str, Any]]]
) -> None:
    """Let `name=value` replace an option, or the entries of an axis."""
    name, equals, text = setting.partition("=")
    if not equals or not name:
        raise ConfigError(f"`set` must be name=value, such as seed=3, got {setting!r}")
    name = name.replace("-", "_")
    value = yaml_value(text, f"the value of `set` for {name}")
    for axis, entries in axes.items():
        if axis != name and any(name in own for own in entries.values()):
            raise ConfigError(
                f"`set` must replace all of axis {axis!r}, which sets {name!r} itself"
            )
    if name in axes:
        axes[name] = _entries(name, value if isinstance(value, list) else [value])
    else:
        options[name] = value


def _entries(axis: str, values: Any) -> dict[str, Mapping[str, Any]]:
    """Label -> options, for each entry of an axis."""
    if not isinstance(values, list) or not values:
        raise ConfigError(
            f"every axis of a study's grid must be a list of entries, but {axis!r} is {values!r}"
        )
    entries = [_entry(axis, value) for value in values]
    label, count = Counter(label for label, _ in entries).most_common(1)[0]
    if count > 1:
        raise ConfigError(f"entries of an axis must differ, but {axis!r} has {label!r} twice")
    return dict(entries)


def _entry(axis: str, value: Any) -> tuple[str, Mapping[str, Any]]:
    """Label and options of an entry: a value of the axis's own option, or several options."""
    if not isinstance(value, dict):
        is_path = isinstance(value, str) and axis in PATHS
        return printable(Path(value).name if is_path else value), {axis: value}
    options = _normalised(value)
    label = options.pop("name", None)
    words = [str(own) if name == axis else f"{name} {own}" for name, own in options.items()]
    return printable(", ".join(words) if label is None else label), options


def _normalised(options: Mapping[Any, Any]) -> dict[str, Any]:
    """The options under their Python names: a file may write `lora-rank` for `lora_rank`."""
    found = {printable(name).replace("-", "_"): value for name, value in options.items()}
    if len(found) < len(options):
        raise ConfigError(
            f"a study file must give each name once, got {', '.join(map(str, options))}"
        )
    return found


def printable(text: Any) -> str:
    """A text from a file without the characters that control a terminal."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in str(text))
