# SPDX-License-Identifier: Apache-2.0
"""A study file as cells: which commands, in which order, with what shared. Needs no torch."""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from keylayers.commands.repeat import Command, command_words
from keylayers.commands.study.cell_options import (
    CURVE,
    EVALUATION,
    KNOWN,
    RANKING,
    STAGE_1,
    TRAINED_ON,
    TRAINING,
    TRAINING_THAT_RANKS,
    USUAL,
    VERIFICATION,
    VERIFY,
    eval_options,
    evaluated_options,
    given_options,
    names_of,
    rank_options,
    train_options,
    verify_options,
)
from keylayers.commands.study.contents import content
from keylayers.commands.study.yaml_file import AxisPoint, StudyFile
from keylayers.environment import environment
from keylayers.errors import ConfigError
from keylayers.files import STAGE_1_ADAPTER, STAGE_1_CHECKPOINT, json_sha256
from keylayers.model.options import ModelOptions
from keylayers.ranking.budget import Auto

Kind = Literal["stage-1", "ranking", "verification", "training", "evaluation"]
Point = Mapping[str, str]  # axis -> what stands there, in the words of the study file

CELLS = "cells"  # the folder of a study that holds those of its cells
TUNED = "tuned"  # what is trained, in a cell's folder
FREE_METHOD = "update-norm"  # ranks stage 1's update without a pass, in the cell that makes it
KEY_LENGTH = 12  # hexadecimal digits of a cell's hash that its folder is named by
WITHOUT_EFFECT = ("report_to", "save_steps")  # on what comes out
ALL_MODULES = ("1.0", "1.0x-params")  # budgets
CANDIDATES = ("model", "revision", "towers")  # options that decide which modules there are
# What a command makes of all options of a cell, which says what cannot be together.
CHECKS: Mapping[Kind, Callable[[Mapping[str, Any]], object]] = {
    "stage-1": rank_options,
    "ranking": rank_options,
    "verification": verify_options,
    "training": train_options,
    "evaluation": eval_options,
}


@dataclass(frozen=True)
class Cell:
    """One piece of a study.

    Attributes:
        kind: What it makes.
        key: Hash of all that decides what comes out.
        commands: The words of keylayers' commands that make it, without output folders.
        needs: Names of the cells that must be finished before.
        points: The combinations of the study file that it belongs to.
        options: Those that the study file gives it.
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
        ConfigError: an option is unknown, has a value that cannot be used or no effect, or cannot
            be together with the others.
    """
    given: set[str] = set()
    cells: dict[str, Cell] = {}
    points: dict[str, dict[tuple[str, ...], Point]] = {}
    planner = _Planner(root, study.verify, evaluated_options(study.evaluate), environment())
    for point, options in combinations(study):
        asked = given_options(options)
        given |= asked.keys()
        for cell in planner.cells_at(asked):
            if cell.name not in cells:
                CHECKS[cell.kind](cell.options)
                cells[cell.name] = cell
            own = {axis: point[axis] for axis in point if _decides(study.grid[axis], cell)}
            points.setdefault(cell.name, {})[tuple(own.values())] = own
    if study.evaluate and not any(cell.kind == "evaluation" for cell in cells.values()):
        raise ConfigError(
            "`evaluate` of a study must be left out where nothing is trained; give `budget`, "
            "`freeze` or `rank_first` to train"
        )
    _check_have_effect(given, cells.values())
    return [replace(cell, points=tuple(points[name].values())) for name, cell in cells.items()]


def _check_have_effect(given: set[str], cells: Collection[Cell]) -> None:
    """Refuse options that no cell takes."""
    kinds = list(dict.fromkeys(cell.kind for cell in cells))
    taken = {"rank_first"}.union(*(cell.options for cell in cells))
    if "training" in kinds:
        taken |= TRAINED_ON.keys()
    for name in sorted(given - taken):
        raise ConfigError(
            f"every option of a study must have an effect, but no cell of this one "
            f"({', '.join(kinds)}) takes `{name}`; leave it out"
        )


def _decides(axis: Sequence[AxisPoint], cell: Cell) -> bool:
    """Whether the entries of an axis make a difference to a cell."""
    names = {"stage-1": STAGE_1, "ranking": RANKING, "verification": VERIFICATION}.get(
        cell.kind, KNOWN
    )
    if names is KNOWN and cell.options.get("budget") != str(Auto()):
        names = tuple(name for name in KNOWN if name not in CURVE)
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


@dataclass(frozen=True)
class _Planner:
    """What the cells of all combinations have in common.

    Attributes:
        root: Folder of the study.
        verify: Whether the mask curve of every ranking is measured.
        evaluate: Options of `keylayers eval` for all that is trained; none: it is not evaluated.
        made_by: The software and the kind of machine. Stage 1 is trained anew by others, so a cell
            is another one with them, too.
    """

    root: Path
    verify: bool
    evaluate: Mapping[str, Any]
    made_by: Mapping[str, Any]

    def cells_at(self, options: Mapping[str, Any]) -> list[Cell]:
        """What one combination needs, each after its needs, a training where something selects."""
        if options.get("rank_first"):
            cells = [self._run_that_ranks(options)]
        else:
            cells = self._ranked(options)
            if not {"budget", "freeze"} & set(options):
                return cells
            cells.append(self._training(options, {cell.kind: cell for cell in cells}))
        return [*cells, self._evaluation(cells[-1])] if self.evaluate else cells

    def _ranked(self, options: Mapping[str, Any]) -> list[Cell]:
        """A ranking, the stage 1 before it if there is no update yet, and its mask curve."""
        before, place = [], {}
        rank = list(_command("rank", options, RANKING))
        if not {"adapter", "tuned"} & set(options):
            free = {**options, "method": FREE_METHOD}
            command = _command("rank", free, (*STAGE_1, "method"))
            before = [self._cell("stage-1", options, STAGE_1, [command])]
            folder = self._folder(before[0])
            rank += ["--stage-1", str(folder)]
            is_full = options.get("update") == "full"
            place = (
                {"tuned": str(folder / STAGE_1_CHECKPOINT)}
                if is_full
                else {"adapter": str(folder / STAGE_1_ADAPTER)}
            )
        ranking = self._cell("ranking", options, RANKING, [tuple(rank)], before)
        if not self.verify:
            return [*before, ranking]
        own = {**options, **place, "ranking": str(self._folder(ranking))}
        verify = _command("verify", own, VERIFY)
        curve = self._cell("verification", options, VERIFICATION, [verify], [ranking])
        return [*before, ranking, curve]

    def _training(self, options: Mapping[str, Any], ranked: Mapping[str, Cell]) -> Cell:
        """The training of what a ranking selects, on its own model and data or on others."""
        own = _trained_on(options)
        needed = ranked["ranking"]
        inputs = [needed]
        if options.get("budget") == str(Auto()):
            if "verification" not in ranked:
                raise ConfigError(
                    "`verify` of a study must not be false with `budget` auto, which is what the "
                    "mask curve recommends"
                )
            needed = ranked["verification"]
            inputs = [needed]
        elif options.get("budget") in ALL_MODULES and "stage-1" in ranked:
            # All modules of one stage 1 are the same whatever ranks them, so one training, on the
            # ranking that is made beside it, serves every method. Without `steps` it takes as many
            # as stage 1.
            needed = ranked["stage-1"]
            is_any = all(_same(own, options, name) for name in CANDIDATES) and "steps" in options
            inputs = [] if is_any else [needed]
        command = _command("train", {**own, "ranking": str(self._folder(needed))}, TRAINING)
        cell = self._cell("training", own, TRAINING, [command], inputs)
        return replace(cell, needs=(needed.name,))

    def _run_that_ranks(self, options: Mapping[str, Any]) -> Cell:
        """A training with the ranking inside."""
        for name in TRAINED_ON:
            if name in options:
                raise ConfigError(
                    f"`{name}` of a study must be left out with `rank_first`, where what is ranked "
                    f"is what is trained"
                )
        command = _command("train", options, TRAINING_THAT_RANKS)
        return self._cell("training", options, TRAINING_THAT_RANKS, [command])

    def _evaluation(self, trained: Cell) -> Cell:
        """What was trained beside its base model, by `keylayers eval`, which runs all towers."""
        names = [name for name in names_of(ModelOptions) if name != "towers"]
        own = {name: trained.options[name] for name in names if name in trained.options}
        own |= self.evaluate
        kind = "checkpoint" if trained.options.get("update") == "full" else "adapter"
        tuned = {kind: [str(self._folder(trained) / TUNED)]}
        command = tuple(command_words("eval", {**own, **tuned}))
        return self._cell("evaluation", own, EVALUATION, [command], [trained])

    def _cell(
        self,
        kind: Kind,
        options: Mapping[str, Any],
        names: Sequence[str],
        commands: Sequence[tuple[str, ...]],
        needs: Sequence[Cell] = (),
    ) -> Cell:
        decisive = {
            name: content(name, options[name])
            for name in names
            if name in options and name not in WITHOUT_EFFECT and options[name] != USUAL.get(name)
        }
        inputs = {
            "made_by": self.made_by,
            "kind": kind,
            "options": decisive,
            "needs": [one.key for one in needs],
        }
        key = json_sha256(inputs)[:KEY_LENGTH]
        asked = {name: options[name] for name in (*names, "max_steps") if name in options}
        return Cell(kind, key, tuple(commands), tuple(one.name for one in needs), (), asked)

    def _folder(self, cell: Cell) -> Path:
        return self.root / CELLS / cell.name


def _trained_on(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a training: those of the ranking but for what is given for it alone."""
    own = {**options, **{name: options[one] for one, name in TRAINED_ON.items() if one in options}}
    if not _same(own, options, "model") and "train_revision" not in options:
        own.pop("revision", None)  # it is one of the ranking's model
    return own


def _same(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    """Whether an option has the same value in both."""
    usual = USUAL.get(name)
    return bool(one.get(name, usual) == other.get(name, usual))


def _command(command: Command, options: Mapping[str, Any], names: Iterable[str]) -> tuple[str, ...]:
    asked = {name: options[name] for name in (*names, "ranking") if name in options}
    return tuple(command_words(command, asked))
