# SPDX-License-Identifier: Apache-2.0
"""A study file: options of every run, a grid of those that differ, and whether to verify."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keylayers.errors import ConfigError, did_you_mean

PARTS = ("options", "grid", "verify")


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
    """

    options: Mapping[str, Any]
    grid: Mapping[str, tuple[AxisPoint, ...]]
    verify: bool = True

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
                    f"a study file must hold options, grid and verify and nothing else, but "
                    f"{source} has {key!r}{did_you_mean(str(key), PARTS)}"
                )
        options, grid = ({} if (part := content.get(name)) is None else part for name in PARTS[:2])
        verify = content.get("verify", True)
        for name, part in (("options", options), ("grid", grid)):
            if not isinstance(part, dict):
                raise ConfigError(
                    f"`{name}` of a study must map names to values, but in {source} it is a "
                    f"{type(part).__name__}"
                )
        if not isinstance(verify, bool):
            raise ConfigError(f"`verify` of a study must be true or false, got {verify!r}")
        axes = {_normal(axis): _axis(_normal(axis), points) for axis, points in grid.items()}
        return StudyFile(_options(options), axes, verify)


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
        return AxisPoint(str(label) if label is not None else ", ".join(words), options)
    label = Path(one).name if isinstance(one, str) and axis in ("model", "data") else str(one)
    return AxisPoint(label, {axis: one})


def _options(options: Mapping[Any, Any]) -> dict[str, Any]:
    return {_normal(name): value for name, value in options.items()}


def _normal(name: Any) -> str:
    return str(name).replace("-", "_")
