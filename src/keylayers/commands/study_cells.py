# SPDX-License-Identifier: Apache-2.0
"""The cells of a study: keylayers commands, each in a folder named by a hash of its inputs.

The commands' own command lines say which options exist, what their defaults are, and whether a
value is valid. Needs no torch.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from cyclopts import App

from keylayers.cli import app as keylayers
from keylayers.commands.repeat import flag_words
from keylayers.commands.study_grid import Study
from keylayers.environment import environment
from keylayers.errors import ConfigError, did_you_mean
from keylayers.files import STAGE_1_ADAPTER, STAGE_1_CHECKPOINT, json_sha256
from keylayers.ranking.budget import parse_budget

Options = Mapping[str, Any]

AUTO = "auto"  # the budget that is read from a mask curve
CELLS = "cells"  # the folder below the output that holds the cells
TUNED = "tuned"  # what is trained, in the folder of its cell
COMMANDS = {"stage-1": "rank", "ranking": "rank", "verification": "verify"}
COMMANDS |= {"training": "train", "evaluation": "eval"}
# Groups of options in the help of the commands.
MODEL, DATA, UPDATE = "Model", "Data", "An update that exists already"
STABILITY, SCORING, COMPARED = "When stage 1 ends", "Scoring", "Compared"
NOT_FOR_STUDIES = ("output", "config", "ranking", "stage_1", "push_to_hub", "private")
NO_EFFECT = ("report_to", "save_steps")  # on results
FILES = ("model", "data", "adapter", "tuned", "chat_template", "forgetting_data", "task_folder")
# Options whose validity does not depend on other options.
INDEPENDENT = (*FILES, "revision", "seed", "mask_seed", "max_steps", "steps")


@dataclass(frozen=True)
class Cell:
    """One command of a study: what it makes, from which options, and what must be finished before.

    The key is a hash of everything that decides the result. The points are the combinations of the
    grid that the cell belongs to: axis -> label.
    """

    kind: str
    key: str
    options: Options
    words: tuple[str, ...]
    needs: tuple[str, ...]
    points: tuple[Mapping[str, str], ...] = ()

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.kind}-{self.key}"


@cache
def defaults_of(command: str, without: Collection[str] = (), only: Collection[str] = ()) -> Options:
    """Option -> default, for the options that a study may give a command, by groups."""
    given = keylayers.default_parameter
    found = {}
    for argument in keylayers[command].assemble_argument_collection(default_parameter=given):
        name = argument.name[2:].replace("-", "_")  # empty for a whole group
        group = argument.parameter.group[0].name  # type: ignore[index]
        is_wanted = group in only if only else group not in without
        if name and name not in NOT_FOR_STUDIES and is_wanted:
            found[name] = argument.field_info.default
    return found


def plan(study: Study, root: Path) -> list[Cell]:
    """The cells of a study below the folder `root`, each after the cells that it needs.

    Raises:
        ConfigError: an option is unknown, has no effect or cannot have its value.
    """
    make = partial(_cell, root, environment())  # other versions give other results: other cells
    cells: dict[str, Cell] = {}
    points: dict[str, list[Mapping[str, str]]] = {}
    given = {f"evaluate: {name}" for name in study.evaluate}
    taken = {"rank_first"}
    for point, options in study.combinations():
        given |= options.keys()
        scope: set[str] = set()  # the options that make a difference to a cell or to its needs
        for cell in _cells_of(study, options, root, make):
            own = scope | cell.options.keys()
            if cell.kind == "training" and not options.get("rank_first"):
                own |= _trained_on().keys()
            if cell.kind != "verification" or options.get("budget") == AUTO:
                scope = own
            taken |= own
            if cell.kind == "evaluation":
                taken |= {f"evaluate: {name}" for name in defaults_of("eval", (MODEL, COMPARED))}
            labels = {axis: point[axis] for axis in point if own & study.names_of(axis)}
            cells.setdefault(cell.name, cell)
            if labels not in points.setdefault(cell.name, []):
                points[cell.name].append(labels)
    known = {**defaults_of("rank"), **defaults_of("verify"), **defaults_of("train")}
    kinds = ", ".join(sorted({cell.kind for cell in cells.values()}))
    for name in sorted(given - taken):
        raise ConfigError(
            f"every option of a study must have an effect, but none of its cells ({kinds}) takes "
            f"`{name}`{did_you_mean(name, known)}; leave it out"
        )
    return [replace(cell, points=tuple(points[name])) for name, cell in cells.items()]


def check(cells: Iterable[Cell]) -> None:
    """Let the commands' own command line parse the words of all cells, before any cell is run.

    Raises:
        ConfigError, CycloptsError: a command would refuse its words.
    """
    # Without the configuration of the application, which would read rankings that do not exist yet.
    parser = App(default_parameter=keylayers.default_parameter)
    for command in dict.fromkeys(COMMANDS.values()):
        parser.command(keylayers[command], name=command)
    seen: set[tuple[str, ...]] = set()
    for cell in cells:  # parsing takes 40 ms: once for each value, and for values that interact
        values = {(cell.kind, *map(str, item)) for item in cell.options.items()}
        interact = (str(item) for item in cell.options.items() if item[0] not in INDEPENDENT)
        new = {*values, ("together", cell.kind, *interact)}
        if not new <= seen:
            parser.parse_args(cell.words, print_error=False, exit_on_error=False)
            if cell.options.get("budget") not in (None, AUTO):
                parse_budget(str(cell.options["budget"]))
        seen |= new


@cache
def _trained_on() -> dict[str, str]:
    """Options of trainings only -> the options that they replace."""
    return {f"train_{name}": name for name in defaults_of("rank", (), (MODEL, DATA))}


def _cells_of(study: Study, options: Options, root: Path, make: Any) -> list[Cell]:
    """What one combination needs, in order; it trains if something selects modules."""
    if options.get("rank_first"):
        cells = [make("training", options, defaults_of("train"))]
    else:
        cells = _ranked(study, options, root, make)
        if "budget" in options or "freeze" in options:
            cells.append(_training(options, {cell.kind: cell for cell in cells}, root, make))
    if study.evaluate and cells[-1].kind == "training":
        trained = cells[-1].options
        model = [name for name in defaults_of("eval", (), (MODEL,)) if name != "towers"]
        own = {name: trained[name] for name in model if name in trained}
        own |= {name: value for name, value in study.evaluate.items() if value is not None}
        flag = "checkpoint" if trained.get("update") == "full" else "adapter"
        place = {flag: root / CELLS / cells[-1].name / TUNED}
        cells.append(make("evaluation", own, own, place, cells[-1:]))
    return cells


def _ranked(study: Study, options: Options, root: Path, make: Any) -> list[Cell]:
    """A ranking; before it stage 1 if there is no update yet; after it the mask curve."""
    cells, shared, update = [], {}, {}
    if "adapter" not in options and "tuned" not in options:
        own = defaults_of("rank", (UPDATE, SCORING))
        cells = [make("stage-1", options, own, {"method": "update-norm"})]  # the fastest
        folder = root / CELLS / cells[0].name
        shared, update = {"stage_1": folder}, {"adapter": folder / STAGE_1_ADAPTER}
        if options.get("update") == "full":
            update = {"tuned": folder / STAGE_1_CHECKPOINT}
    cells.append(make("ranking", options, defaults_of("rank"), shared, cells))
    if study.verify:
        place = {"ranking": root / CELLS / cells[-1].name, **update}
        cells.append(make("verification", options, defaults_of("verify"), place, cells[-1:]))
    return cells


def _training(options: Options, ranked: Mapping[str, Cell], root: Path, make: Any) -> Cell:
    """The training of what a ranking selects, on its own model and data or on others."""
    own = {**options, **{n: options[t] for t, n in _trained_on().items() if t in options}}
    if own.get("model") != options.get("model") and "train_revision" not in options:
        own.pop("revision", None)  # that of the ranked model
    needed, is_any = ranked["ranking"], False
    if options.get("budget") == AUTO:
        if "verification" not in ranked:
            raise ConfigError("`verify` of a study must not be false with `budget` auto")
        needed = ranked["verification"]
    elif str(options.get("budget")) in ("1.0", "1.0x-params") and "stage-1" in ranked:
        # All modules are the same set whatever ranks them: the ranking that comes with stage 1
        # serves every method and, if `steps` is given, every stage 1 of the same modules.
        needed = ranked["stage-1"]
        is_same = all(own.get(n) == options.get(n) for n in ("model", "revision", "towers"))
        is_any = is_same and "steps" in options
    place = {"ranking": root / CELLS / needed.name}
    names = defaults_of("train", (STABILITY, SCORING))
    cell: Cell = make("training", own, names, place, [] if is_any else [needed])
    return replace(cell, needs=(needed.name,))


def _cell(
    root: Path,
    made_by: Options,
    kind: str,
    options: Options,
    names: Iterable[str],
    place: Options | None = None,
    needs: Sequence[Cell] = (),
) -> Cell:
    """A cell that takes the options called `names`; the study itself adds those of `place`."""
    own = {name: options[name] for name in names if name in options}
    # Without `steps`, `train` takes the steps of stage 1, so its default says nothing.
    usual = {**defaults_of(COMMANDS[kind]), "steps": None}
    decisive = {
        name: _content(name, value)
        for name, value in own.items()
        if name not in NO_EFFECT and str(value) != str(usual.get(name))
    }
    key = json_sha256([made_by, kind, decisive, [cell.key for cell in needs]])[:12]
    cell = Cell(kind, key, own, (COMMANDS[kind],), tuple(cell.name for cell in needs))
    output = root / CELLS / cell.name / (TUNED if kind == "training" else "")
    given = {**own, **(place or {}), "output": output}
    words = []
    for name, value in given.items():
        _check_value(name, value)
        words += flag_words(name, value)
    return replace(cell, words=(*cell.words, *words))


def _check_value(name: str, value: Any) -> None:
    for part in value if isinstance(value, list) else [value]:
        is_huge = isinstance(part, int) and abs(part) >= 2**63
        if is_huge or not isinstance(part, (str, int, float, Path)):
            raise ConfigError(f"`{name}` of a study must be a text or a number, got {part!r:.60}")


def _content(name: str, value: Any) -> Any:
    """A value as it is hashed: a file or a folder by what it holds, so that a study can move."""
    if name not in FILES or isinstance(value, list):
        return [_content(name, part) for part in value] if isinstance(value, list) else value
    try:
        return _sha256(Path(value).resolve()) if Path(value).exists() else value
    except (OSError, TypeError) as error:
        raise ConfigError(f"`{name}` of a study must be a path or a name: {error}") from error


@cache
def _sha256(path: Path) -> str:
    """Hash of a file, or of all files of a folder and their names."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return json_sha256([[str(file.relative_to(path)), _sha256(file)] for file in files])
