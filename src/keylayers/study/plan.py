# SPDX-License-Identifier: Apache-2.0
"""A study file as cells: which commands, in which order, with what shared. Needs no torch."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from keylayers._version import __version__
from keylayers.errors import ConfigError, did_you_mean
from keylayers.options import (
    CurveOptions,
    DataOptions,
    MaskOptions,
    ModelOptions,
    SelectionOptions,
    StabilityOptions,
    TrainingOptions,
    UpdateOptions,
)
from keylayers.options.command_line import Command, command_words
from keylayers.options.evaluation import (
    BenchmarkOptions,
    EvalRunOptions,
    LossOptions,
    ProblemOptions,
)
from keylayers.records import STAGE_1_ADAPTER, STAGE_1_CHECKPOINT, environment, json_sha256
from keylayers.selection import parse_budget
from keylayers.study.yaml_file import AxisPoint, StudyFile

Kind = Literal["stage-1", "ranking", "training", "evaluation"]
Point = Mapping[str, str]  # axis -> what stands there, in the words of the study file

CELLS = "cells"  # the folder of a study that holds those of its cells
TUNED = "tuned"  # what is trained, in a cell's folder
FREE_METHOD = "update-norm"  # ranks stage 1's update without a pass, in the cell that makes it
KEY_LENGTH = 12  # hexadecimal digits of a cell's hash that its folder is named by


def _names(*parts: type) -> tuple[str, ...]:
    return tuple(one.name for part in parts for one in fields(part))


STAGE_1 = _names(ModelOptions, DataOptions, TrainingOptions, StabilityOptions)
RANKING = (*STAGE_1, *_names(UpdateOptions, MaskOptions))
CURVE = _names(CurveOptions)
TRAINING = _names(SelectionOptions, ModelOptions, DataOptions, TrainingOptions)
EVALUATED = _names(BenchmarkOptions, LossOptions, ProblemOptions, EvalRunOptions)
EVALUATION = (*_names(ModelOptions), *EVALUATED)
TRAINING_THAT_RANKS = (*TRAINING, *_names(StabilityOptions, MaskOptions))
USUAL = {
    one.name: one.default
    for part in (
        *(ModelOptions, DataOptions, TrainingOptions, StabilityOptions, UpdateOptions),
        *(MaskOptions, CurveOptions),
    )
    for one in fields(part)
    if one.default is not MISSING
}
WITHOUT_EFFECT = ("report_to", "save_steps")  # on what comes out
# Or names of the hub, or of lm-evaluation-harness.
FILES = (
    *("model", "data", "adapter", "tuned", "chat_template"),
    *("forgetting_data", "task_folder", "problems"),
)
# Options of a study alone: what is trained on a ranking of another model, or of other data.
TRAINED_ON = {f"train_{name}": name for name in _names(ModelOptions, DataOptions)}
KNOWN = tuple(dict.fromkeys((*RANKING, *CURVE, *TRAINING, *TRAINED_ON)))


@dataclass(frozen=True)
class Cell:
    """One piece of a study.

    Attributes:
        kind: What it makes.
        key: Hash of all that decides what comes out.
        commands: The words of keylayers' commands that make it, without output folders.
        needs: Names of the cells that must be finished before.
        points: The combinations of the study file that it belongs to.
        options: Those that the study file gives it, and whether a ranking is verified.
    """

    kind: Kind
    key: str
    commands: tuple[tuple[str, ...], ...]
    needs: tuple[str, ...]
    points: tuple[Point, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What its folder is called."""
        return f"{self.kind}-{self.key}"


def plan(study: StudyFile, root: Path) -> list[Cell]:
    """The cells of a study, each after those that it needs.

    Args:
        study: What is asked for.
        root: Folder of the study.

    Raises:
        ConfigError: an option is unknown, or has a value that cannot be used.
    """
    cells: dict[str, Cell] = {}
    points: dict[str, dict[tuple[str, ...], Point]] = {}
    _check_evaluated(study.evaluate)
    for point, options in combinations(study):
        _check_known(options)
        for cell in _cells_at(options, study, root):
            cells.setdefault(cell.name, cell)
            own = {axis: point[axis] for axis in point if _decides(study.grid[axis], cell.kind)}
            points.setdefault(cell.name, {})[tuple(own.values())] = own
    return [replace(cell, points=tuple(points[name].values())) for name, cell in cells.items()]


def _decides(axis: Sequence[AxisPoint], kind: Kind) -> bool:
    """Whether the entries of an axis make a difference to cells of a kind."""
    names = {"stage-1": STAGE_1, "ranking": (*RANKING, *CURVE)}.get(kind, KNOWN)
    return any(name in names for one in axis for name in one.options)


def study_record(study: StudyFile, cells: Sequence[Cell]) -> dict[str, Any]:
    """What was asked for, by which software, and the cells that it takes."""
    return {
        "environment": environment(),
        "options": dict(study.options),
        "grid": {axis: [asdict(one) for one in points] for axis, points in study.grid.items()},
        "verify": study.verify,
        "compare": list(study.compare),
        "evaluate": dict(study.evaluate),
        "cells": [asdict(cell) for cell in cells],
    }


def combinations(study: StudyFile) -> Iterator[tuple[Point, dict[str, Any]]]:
    """Every combination of the grid: what stands on each axis, and the options that it gives."""
    axes = [[(axis, one) for one in points] for axis, points in study.grid.items()]
    for chosen in itertools.product(*axes):
        point = {axis: one.label for axis, one in chosen}
        options = dict(study.options)
        for _, one in chosen:
            options |= one.options
        yield point, options


def _cells_at(options: Mapping[str, Any], study: StudyFile, root: Path) -> Iterator[Cell]:
    """What one combination needs: stage 1, a ranking, and a training where there is a budget."""
    selection = _selection(options)
    if selection is not None and selection.rank_first:
        command = _command("train", options, TRAINING_THAT_RANKS)
        trained = _cell("training", options, TRAINING_THAT_RANKS, [command], [])
    else:
        needs, places = [], {}
        if not any(options.get(name) for name in ("adapter", "tuned")):
            stage_1 = _stage_1(options)
            yield stage_1
            needs, places = [stage_1], _places(options, _folder(root, stage_1))
        ranking = _ranking(options, needs, study.verify, places, root)
        yield ranking
        if selection is None:
            return
        trained = _training(options, ranking, needs, root)
    yield trained
    if study.evaluate:
        yield _evaluation(trained, study.evaluate, root)


def _stage_1(options: Mapping[str, Any]) -> Cell:
    free = {**options, "method": FREE_METHOD}
    command = _command("rank", free, (*STAGE_1, "method"))
    return _cell("stage-1", options, STAGE_1, [command])


def _places(options: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Where a stage 1 leaves what it trained, as an option that names it."""
    if options.get("update") == "full":
        return {"tuned": str(folder / STAGE_1_CHECKPOINT)}
    return {"adapter": str(folder / STAGE_1_ADAPTER)}


def _evaluation(trained: Cell, evaluate: Mapping[str, Any], root: Path) -> Cell:
    """What was trained beside its base model, by `keylayers eval`."""
    own = {name: trained.options[name] for name in _names(ModelOptions) if name in trained.options}
    own |= evaluate
    kind = "checkpoint" if trained.options.get("update") == "full" else "adapter"
    tuned = {kind: [str(_folder(root, trained) / TUNED)]}
    command = command_words("eval", {**own, **tuned})
    return _cell("evaluation", own, EVALUATION, [tuple(command)], [trained])


def _training(
    options: Mapping[str, Any], ranking: Cell, stage_1: Sequence[Cell], root: Path
) -> Cell:
    """The training of what a ranking selects, on the ranking's own model and data or on others."""
    others = {own: options[name] for name, own in TRAINED_ON.items() if name in options}
    own = {**options, **others, "ranking": str(_folder(root, ranking))}
    command = _command("train", own, TRAINING)
    del own["ranking"]
    inputs: Sequence[Cell] = [ranking]
    if str(options.get("budget")) in ("1.0", "1.0x-params"):
        # All modules are all modules whatever ranked them, so one training serves every method;
        # it takes as many steps as stage 1 if nobody says how many.
        inputs = [] if "steps" in options else stage_1
    return replace(_cell("training", own, TRAINING, [command], inputs), needs=(ranking.name,))


def _ranking(
    options: Mapping[str, Any],
    needs: Sequence[Cell],
    is_verified: bool,
    places: Mapping[str, str],
    root: Path,
) -> Cell:
    rank = list(_command("rank", options, RANKING))
    if needs:
        rank += ["--stage-1", str(_folder(root, needs[0]))]
    names, commands = RANKING, [tuple(rank)]
    if is_verified:
        names = (*RANKING, *CURVE)
        cell = _cell("ranking", options, names, [], needs)
        asked: dict[str, Any] = {name: options[name] for name in CURVE if name in options}
        asked.update(places)
        asked |= {"ranking": str(_folder(root, cell))}
        commands.append(tuple(command_words("verify", asked)))
    return _cell("ranking", options, names, commands, needs)


def _cell(
    kind: Kind,
    options: Mapping[str, Any],
    names: Sequence[str],
    commands: Sequence[tuple[str, ...]],
    needs: Sequence[Cell] = (),
) -> Cell:
    decisive = {
        name: _content(name, options[name])
        for name in names
        if name in options and name not in WITHOUT_EFFECT and options[name] != USUAL.get(name)
    }
    inputs = {
        "keylayers": __version__,
        "kind": kind,
        "options": decisive,
        "needs": [one.key for one in needs],
        "is_verified": any(name in CURVE for name in names),
    }
    key = json_sha256(inputs)[:KEY_LENGTH]
    asked = {name: options[name] for name in (*names, "max_steps") if name in options}
    asked |= {"is_verified": True} if inputs["is_verified"] else {}
    return Cell(kind, key, tuple(commands), tuple(one.name for one in needs), (), asked)


def _command(command: Command, options: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    asked = {name: options[name] for name in (*names, "ranking") if name in options}
    return tuple(command_words(command, asked))


def _folder(root: Path, cell: Cell) -> Path:
    return root / CELLS / cell.name


def _selection(options: Mapping[str, Any]) -> SelectionOptions | None:
    """What is trained at one combination; None if nothing is."""
    asked = {one: options[one] for one in _names(SelectionOptions) if one in options}
    if not {"budget", "freeze", "rank_first"} & set(asked):
        return None
    if "budget" in asked:
        asked["budget"] = str(asked["budget"])
        if asked["budget"] != "auto":
            parse_budget(asked["budget"])  # refused here rather than after the ranking
    ranked = {} if "rank_first" in asked else {"ranking": "."}
    try:
        return SelectionOptions(**ranked | asked)
    except TypeError as error:
        raise ConfigError(
            f"a budget and what goes with it must be of the kinds that `keylayers train` takes, "
            f"got {asked}"
        ) from error


def _check_known(options: Mapping[str, Any]) -> None:
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


def _check_evaluated(evaluate: Mapping[str, Any]) -> None:
    for name in evaluate:
        if name not in EVALUATED:
            raise ConfigError(
                f"every option under `evaluate` of a study must be one of `keylayers eval`, beside "
                f"those of models, got {name!r}{did_you_mean(name, EVALUATED)}"
            )


def _content(name: str, value: Any) -> Any:
    """An option as it is hashed: files by what they hold, so that a study can be moved."""
    if isinstance(value, list):
        return [_content(name, one) for one in value]
    if name in FILES and isinstance(value, str):
        try:
            if Path(value).exists():
                return {"sha256": _sha256(Path(value).resolve())}
        except OSError as error:  # such as a name longer than the system takes
            raise ConfigError(
                f"`{name}` of a study must be a file, a folder or a name, but {value[:40]!r} "
                f"cannot be one: {error.strerror}"
            ) from error
    return value


@cache
def _sha256(path: Path) -> str:
    """Of a file, or of all files of a folder with their names."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(one for one in path.rglob("*") if one.is_file())
    return json_sha256([[str(one.relative_to(path)), _sha256(one)] for one in files])
