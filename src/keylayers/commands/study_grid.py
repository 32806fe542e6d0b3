# SPDX-License-Identifier: Apache-2.0
"""A study file: options that all runs share, a grid of options that differ, what is measured."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from keylayers.errors import ConfigError
from keylayers.yaml_values import yaml_value

MAX_COMBINATIONS = 10_000
PATHS = ("model", "data", "train_model", "train_data")  # tables show the last part of the path


class Study(BaseModel):
    """What a study file asks for; options have the names of their flags (`lora_rank`)."""

    model_config = ConfigDict(extra="forbid", strict=True)

    options: dict[str, Any] = {}  # of every run
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}  # axis -> entries
    verify: bool = True  # measure the mask curve of every ranking
    compare: list[Annotated[float, Field(gt=0, lt=1)]] = []  # fractions of the modules
    evaluate: dict[str, Any] = {}  # options of `keylayers eval` for everything that is trained

    @cached_property
    def axes(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Axis -> label of an entry -> the options that it sets."""
        return {axis: _entries(axis, values) for axis, values in self.grid.items()}

    def combinations(self) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
        """For every combination of the grid: axis -> label, and all options that are given."""
        for labels in itertools.product(*self.axes.values()):
            point = dict(zip(self.axes, labels, strict=True))
            options = dict(self.options)
            for axis, label in point.items():
                options |= self.axes[axis][label]
            yield point, {name: value for name, value in options.items() if value is not None}


def read_study(content: Mapping[str, Any], source: str, settings: Sequence[str] = ()) -> Study:
    """A study from the mapping that the YAML file `source` holds, and settings of `--set`."""
    given = {name: part for name, part in _python_names(content).items() if part is not None}
    try:
        study = Study.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(
            f"a study file must hold {', '.join(Study.model_fields)} and nothing else, but in "
            f"{source} `{place:.80}` is {first['input']!r:.40}: {first['msg']}"
        ) from None
    for setting in settings:
        _apply(setting, study)
    if (count := math.prod(map(len, study.grid.values()))) > MAX_COMBINATIONS:
        raise ConfigError(
            f"the grid of a study must have at most {MAX_COMBINATIONS:,} combinations, but that of "
            f"{source} has {count:,}; split it into several studies"
        )
    return study


def _entries(axis: str, values: list[Any]) -> dict[str, dict[str, Any]]:
    """Label -> options of each entry of an axis: a value of its own option, or several options."""
    found: dict[str, dict[str, Any]] = {}
    for value in values:
        options = dict(value) if isinstance(value, dict) else {axis: value}
        words = [str(own) if name == axis else f"{name} {own}" for name, own in options.items()]
        if isinstance(value, str) and axis in PATHS:
            words = [Path(value).name]
        label = printable(options.pop("name", ", ".join(words)))
        if label in found:
            raise ConfigError(f"entries of an axis must differ, but {axis!r} has {label!r} twice")
        found[label] = options
    return found


def _apply(setting: str, study: Study) -> None:
    """Let `name=value` replace an option, or the entries of an axis."""
    name, equals, text = setting.partition("=")
    if not equals or not name:
        raise ConfigError(f"`set` must be name=value, such as seed=3, got {setting!r}")
    name = name.replace("-", "_")
    value = _python_names(yaml_value(text, f"the value of `set` for {name}"))
    for axis, entries in study.grid.items():
        if axis != name and any(isinstance(entry, dict) and name in entry for entry in entries):
            raise ConfigError(
                f"`set` must replace all of axis {axis!r}, which sets {name!r} itself"
            )
    if name in study.grid:
        study.grid[name] = value if isinstance(value, list) else [value]
    else:
        study.options[name] = value


def _python_names(content: Any) -> Any:
    """A copy in which every option is spelled as in Python: `lora_rank`, not `lora-rank`."""
    if isinstance(content, list):
        return [_python_names(part) for part in content]
    if not isinstance(content, Mapping):
        return content
    found = {printable(name).replace("-", "_"): _python_names(v) for name, v in content.items()}
    if len(found) < len(content):
        raise ConfigError(
            f"a study file must give each name once, got {', '.join(map(str, content))}"
        )
    return found


def printable(text: Any) -> str:
    """A text from a file without the characters that control a terminal."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in str(text))
