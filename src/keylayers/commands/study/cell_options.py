# SPDX-License-Identifier: Apache-2.0
"""Which options decide which cells of a study, and all of a command's together as it has them.

Needs no torch. A name is one option wherever it occurs: its type and default are the same in every
class that has it, which a test holds.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from keylayers.commands.rank import RankOptions
from keylayers.commands.scoring_flags import ScoringFlags
from keylayers.commands.selection import SelectionOptions
from keylayers.commands.train import TrainOptions
from keylayers.commands.verify import CurveOptions, VerifyOptions
from keylayers.data.options import DataOptions
from keylayers.errors import ConfigError, did_you_mean
from keylayers.evaluation.options import (
    BenchmarkOptions,
    EvalOptions,
    EvalRunOptions,
    LossOptions,
)
from keylayers.model.options import ModelOptions, UpdateOptions
from keylayers.ranking.budget import parse_budget
from keylayers.training.options import ObjectiveOptions, StabilityOptions, TrainingOptions

Part = TypeVar("Part")

LARGEST = 2**63  # of whole numbers


def names_of(*parts: type) -> tuple[str, ...]:
    """The names of the options of some classes."""
    return tuple(one.name for part in parts for one in fields(part))


STAGE_1 = names_of(ModelOptions, DataOptions, TrainingOptions, StabilityOptions)
RANKING = (*STAGE_1, *names_of(UpdateOptions, ScoringFlags))
VERIFY = names_of(ModelOptions, DataOptions, UpdateOptions, CurveOptions, ObjectiveOptions)
CURVE = names_of(CurveOptions)
VERIFICATION = (*RANKING, *CURVE)
TRAINING = names_of(SelectionOptions, ModelOptions, DataOptions, TrainingOptions)
TRAINING_THAT_RANKS = (*TRAINING, *names_of(StabilityOptions, ScoringFlags))
MEASURED = (BenchmarkOptions, LossOptions, EvalRunOptions)
EVALUATED = names_of(*MEASURED)
EVALUATION = (*names_of(ModelOptions), *EVALUATED)
CLASSES = (
    *(ModelOptions, DataOptions, TrainingOptions, StabilityOptions, UpdateOptions, ScoringFlags),
    *(CurveOptions, SelectionOptions, *MEASURED),
)
TYPES = {one.name: one.type for part in reversed(CLASSES) for one in fields(part)}
# Not those of a selection: `steps` that are not given are as many as stage 1 took.
USUAL = {
    one.name: one.default
    for part in CLASSES
    if part is not SelectionOptions
    for one in fields(part)
    if one.default is not MISSING
}
# Options of a study alone: what is trained on a ranking of another model, or of other data.
TRAINED_ON = {f"train_{name}": name for name in names_of(ModelOptions, DataOptions)}
KNOWN = tuple(dict.fromkeys((*VERIFICATION, *TRAINING, *TRAINED_ON)))


def given_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of one combination that have a value, each of its type.

    Args:
        options: As the study file has them; null is an option that is not given.

    Raises:
        ConfigError: one is unknown or cannot have its value, or `model` or `data` is missing.
    """
    for name in options:
        if name not in KNOWN or name == "ranking":
            raise ConfigError(
                f"every option of a study must be one of `keylayers rank`, `verify` or `train`, "
                f"got {name!r}{did_you_mean(name, KNOWN)}"
            )
    for name in ("model", "data"):
        if not options.get(name):
            raise ConfigError(
                f"a study must say which `{name}`, under `options` or as an axis of its `grid`"
            )
    for name, own in TRAINED_ON.items():
        if name in options and options[name] is None and options.get(own) is not None:
            raise ConfigError(
                f"`{name}` of a study must have a value, got null, which cannot take back the "
                f"`{own}` that the ranking was made with"
            )
    found = _typed_all(options)
    if not found.get("rank_first"):
        found.pop("rank_first", None)
    return found


def evaluated_options(evaluate: Mapping[str, Any]) -> dict[str, Any]:
    """The options under `evaluate` that have a value, each of its type.

    Raises:
        ConfigError: one is unknown or cannot have its value.
    """
    for name in evaluate:
        if name not in EVALUATED:
            raise ConfigError(
                f"every option under `evaluate` of a study must be one of `keylayers eval`, beside "
                f"those of models, got {name!r}{did_you_mean(name, EVALUATED)}"
            )
    return _typed_all(evaluate)


def rank_options(options: Mapping[str, Any]) -> RankOptions:
    """Those of `keylayers rank`, checked together as it does."""
    return RankOptions(
        options_of(ModelOptions, options),
        options_of(DataOptions, options),
        options_of(UpdateOptions, options),
        options_of(TrainingOptions, options),
        options_of(StabilityOptions, options),
        options_of(ScoringFlags, options).scoring(),
    )


def verify_options(options: Mapping[str, Any]) -> VerifyOptions:
    """Those of `keylayers verify`, checked together as it does."""
    return VerifyOptions(
        options_of(ModelOptions, options),
        options_of(DataOptions, options),
        options_of(UpdateOptions, options),
        options_of(CurveOptions, options),
        options_of(ObjectiveOptions, options),
    )


def train_options(options: Mapping[str, Any]) -> TrainOptions:
    """Those of `keylayers train`, checked together as it does; the ranking is still to come."""
    budget = options.get("budget")
    if budget is not None:
        parse_budget(str(budget))  # refused here rather than after the ranking
    ranks = bool(options.get("rank_first"))
    scored = options if ranks else {}
    return TrainOptions(
        options_of(SelectionOptions, {**options, "ranking": None if ranks else "."}),
        options_of(ModelOptions, options),
        options_of(DataOptions, options),
        options_of(TrainingOptions, options),
        options_of(StabilityOptions, scored),
        options_of(ScoringFlags, scored).scoring(),
    )


def eval_options(options: Mapping[str, Any]) -> EvalOptions:
    """Those of `keylayers eval`, checked together as it does; the models are still to come."""
    return EvalOptions(
        options_of(ModelOptions, options),
        benchmarks=options_of(BenchmarkOptions, options),
        losses=options_of(LossOptions, options),
        run=options_of(EvalRunOptions, options),
    )


def options_of(kind: type[Part], options: Mapping[str, Any]) -> Part:
    """One class of options, with what the study gives of it."""
    return kind(**_typed_all({name: options[name] for name in names_of(kind) if name in options}))


def _typed_all(options: Mapping[str, Any]) -> dict[str, Any]:
    """All options that have a value, each of its type."""
    return {
        name: _typed(name, value, TYPES[TRAINED_ON.get(name, name)])
        for name, value in options.items()
        if value is not None
    }


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A value from YAML as the option has it; for YAML 1.1, 0 is an integer and 2e-4 a text."""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (one for one in get_args(kind) if one is not NoneType)
    if get_origin(kind) is tuple:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_typed(name, one, get_args(kind)[0]) for one in values)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        if value not in choices:
            near = did_you_mean(value, choices) if isinstance(value, str) else ""
            raise ConfigError(
                f"`{name}` must be one of {', '.join(choices)}, got {_shown(value)}{near}"
            )
        return value
    if kind is bool:
        if isinstance(value, bool):
            return value
        raise ConfigError(f"`{name}` must be true or false, got {_shown(value)}")
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return _plain(name, value, kind)
    what = {str: "a text", int: "a whole number", float: "a number"}[kind]
    raise ConfigError(f"`{name}` must be {what}, got {_shown(value)}")


def _plain(name: str, value: int | float | str, kind: Any) -> Any:
    """A text or a number as the option has it."""
    if kind is str:
        return str(value)
    what = "a whole number" if kind is int else "a finite number"
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        raise ConfigError(f"`{name}` must be {what}, got {_shown(value)}") from None
    is_other = kind is int and isinstance(value, float) and number != value
    if is_other or abs(number) >= LARGEST or not math.isfinite(number):
        raise ConfigError(f"`{name}` must be {what}, got {_shown(value)}")
    return number


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
