# SPDX-License-Identifier: Apache-2.0
"""The cells of a study: keylayers commands, each in a folder named by a hash of its inputs.

The commands' own options say which options exist, what their defaults are, and whether a value is
valid. Needs no torch.
"""

import hashlib
import shlex
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from cyclopts import App

from keylayers.cli import app as keylayers
from keylayers.commands.options import of_stage_1_alone, option_fields
from keylayers.commands.repeat import flag_words
from keylayers.commands.study_grid import Study
from keylayers.data.options import DataOptions
from keylayers.environment import environment
from keylayers.errors import ConfigError, did_you_mean
from keylayers.files import STAGE_1_ADAPTER, STAGE_1_CHECKPOINT, json_sha256
from keylayers.model.options import ModelOptions
from keylayers.scores.methods import DEFAULT_METHOD

Options = Mapping[str, Any]

AUTO = "auto"  # the budget that is read from a mask curve
CELLS = "cells"  # the folder below the output that holds the cells
TUNED = "tuned"  # what is trained, in the folder of its cell
KINDS = {  # of cells -> the command, and the file that it writes last
    "stage-1": ("rank", "ranking.json"),
    "ranking": ("rank", "ranking.json"),
    "verification": ("verify", "verification.json"),
    "training": ("train", f"{TUNED}/keylayers.json"),
    "evaluation": ("eval", "evaluation.json"),
}
# Options of trainings alone -> the options of rankings that they replace.
OF_TRAINING = {f"train_{o.name}": o.name for o in (*fields(ModelOptions), *fields(DataOptions))}
NO_EFFECT = ("report_to", "save_steps")  # on results
FILES = ("model", "data", "adapter", "tuned", "chat_template", "forgetting_data", "task_folder")
# Options whose validity does not depend on other options.
INDEPENDENT = (*FILES, "revision", "seed", "mask_seed", "max_steps", "steps")


@dataclass(frozen=True)
class Cell:
    """One command of a study, and the folder of its results."""

    kind: str
    folder: Path
    options: Options
    words: tuple[str, ...]  # of the command line
    needs: tuple[str, ...] = ()  # names of the cells that must be finished before
    scope: frozenset[str] = frozenset()  # options that matter to the cell or to what it needs
    points: tuple[Mapping[str, str], ...] = ()  # axis -> label, for each combination that needs it

    @property
    def name(self) -> str:
        """Its kind and a hash of everything that decides its result."""
        return self.folder.name

    @property
    def command(self) -> str:
        """What repeats it in a shell."""
        return f"keylayers {shlex.join(self.words)}"

    @property
    def result(self) -> Path:
        """The file that the command writes last."""
        return self.folder / KINDS[self.kind][1]


@cache
def defaults_of(command: str, without: Collection[str] = ()) -> Options:
    """Option -> default, for what a study may give a command; `without` names parts of options."""
    options = option_fields(command, without)
    set_here = ("ranking", "for_")  # a study names its methods
    found = {name: option.default for name, option in options.items() if name not in set_here}
    return found | ({"method": DEFAULT_METHOD} if "method" in found else {})


def plan(study: Study, root: Path) -> list[Cell]:
    """The cells of a study below the folder `root`, each after the cells that it needs."""
    maker = _Maker(study, root / CELLS, environment())
    set_by = {axis: set().union(*entries.values()) for axis, entries in study.axes.items()}
    cells: dict[str, Cell] = {}
    points: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    given = {f"evaluate: {name}" for name in study.evaluate}
    for point, options in study.combinations():
        given |= options.keys()
        for cell in maker.cells_of(options):
            labels = {axis: label for axis, label in point.items() if cell.scope & set_by[axis]}
            cells.setdefault(cell.name, cell)
            if labels not in points[cell.name]:
                points[cell.name].append(labels)
    known = {**defaults_of("rank"), **defaults_of("verify"), **defaults_of("train")}
    kinds = ", ".join(sorted({cell.kind for cell in cells.values()}))
    for name in sorted(given.difference(*(cell.scope for cell in cells.values()))):
        raise ConfigError(
            f"every option of a study must have an effect, but none of its cells ({kinds}) takes "
            f"`{name}`{did_you_mean(name, known)}; leave it out"
        )
    return [replace(cell, points=tuple(points[name])) for name, cell in cells.items()]


def check(cells: Iterable[Cell]) -> None:
    """Let the commands' own command line parse the words of all cells, before any cell is run."""
    # Without the configuration of the application, which would read rankings that do not exist yet.
    parser = App(default_parameter=keylayers.default_parameter)
    for command in dict.fromkeys(command for command, _ in KINDS.values()):
        parser.command(keylayers[command], name=command)
    seen: set[tuple[str, str]] = set()
    for cell in cells:  # parsing takes 40 ms: once for each value, and for values that interact
        interact = [item for item in cell.options.items() if item[0] not in INDEPENDENT]
        new = {(cell.kind, str(part)) for part in (interact, *cell.options.items())}
        if not new <= seen:
            parser.parse_args(cell.words, print_error=False, exit_on_error=False)
        seen |= new


@dataclass(frozen=True)
class _Maker:
    """Makes the cells of the study's combinations."""

    study: Study
    root: Path
    made_by: Options  # other versions give other results: other cells

    def cells_of(self, options: Options) -> Iterable[Cell]:
        """What one combination needs, in order; it trains if something selects modules."""
        if options.get("rank_first"):
            cells = {"training": self._cell("training", options, defaults_of("train"), {}, [])}
        else:
            cells = self._ranked(options)
            if "budget" in options or "freeze" in options:
                cells["training"] = self._training(options, cells)
        if self.study.evaluate and "training" in cells:
            cells["evaluation"] = self._evaluation(cells["training"])
        return cells.values()

    def _ranked(self, options: Options) -> dict[str, Cell]:
        """A ranking; before it stage 1 if there is no update yet; after it the mask curve."""
        cells, shared, update = {}, {}, {}
        if "adapter" in options or "tuned" in options:
            is_extracted = "tuned" in options and options.get("granularity") == "part"
            unused = of_stage_1_alone(is_extracted=is_extracted)
            known = [name for name in defaults_of("rank", ("stability",)) if name not in unused]
        else:
            known = [*defaults_of("rank")]
            names, fastest = defaults_of("rank", ("update", "scoring")), {"method": "update-norm"}
            cells["stage-1"] = self._cell("stage-1", options, names, fastest, [])
            folder = cells["stage-1"].folder
            shared, update = {"stage_1": folder}, {"adapter": folder / STAGE_1_ADAPTER}
            if options.get("update") == "full":
                update = {"tuned": folder / STAGE_1_CHECKPOINT}
        before = [*cells.values()]
        ranking = self._cell("ranking", options, known, shared, before)
        cells["ranking"] = ranking
        if self.study.verify or options.get("budget") == AUTO:
            names, place = defaults_of("verify"), {"ranking": ranking.folder, **update}
            cells["verification"] = self._cell("verification", options, names, place, [ranking])
        return cells

    def _training(self, options: Options, ranked: Mapping[str, Cell]) -> Cell:
        """The training of what a ranking selects, on its own model and data or on others."""
        own = {**options, **{name: options[t] for t, name in OF_TRAINING.items() if t in options}}
        if own.get("model") != options.get("model") and "train_revision" not in options:
            own.pop("revision", None)  # that of the ranked model
        needed = ranked["ranking"]
        if options.get("budget") == AUTO:
            needed = ranked["verification"]
        elif str(options.get("budget")) in ("1.0", "1.0x-params"):
            # All modules are the same set whatever ranks them: one training serves every method.
            needed = ranked.get("stage-1", needed)
        names = defaults_of("train", ("stability", "scoring"))
        cell = self._cell("training", own, names, {"ranking": needed.folder}, [needed])
        return replace(cell, scope=cell.scope.union(ranked["ranking"].scope, OF_TRAINING))

    def _evaluation(self, training: Cell) -> Cell:
        """What was trained, against its base model."""
        own = {**training.options, "towers": None, **self.study.evaluate}
        names = [option.name for option in fields(ModelOptions)] + [*self.study.evaluate]
        flag = "checkpoint" if training.options.get("update") == "full" else "adapter"
        place = {flag: training.folder / TUNED}
        cell = self._cell("evaluation", own, names, place, [training])
        known = defaults_of("eval", ("model", "compared"))
        return replace(cell, scope=cell.scope.union(f"evaluate: {name}" for name in known))

    def _cell(
        self,
        kind: str,
        options: Options,
        names: Iterable[str],
        place: Options,
        needs: Sequence[Cell],
    ) -> Cell:
        """A cell that takes the options called `names`; the study itself adds those of `place`."""
        own = {name: options[name] for name in names if options.get(name) is not None}
        command = KINDS[kind][0]
        # Without `steps`, `train` takes the steps of stage 1, so its default says nothing.
        usual = {**defaults_of(command), "steps": None}
        decisive = {
            name: _content(name, value)
            for name, value in own.items()
            if name not in NO_EFFECT and str(value) != str(usual.get(name))
        }
        before = tuple(cell.name for cell in needs)
        key = json_sha256([self.made_by, kind, decisive, before])[:12]
        folder = self.root / f"{kind}-{key}"
        output = folder / TUNED if kind == "training" else folder
        words = [command]
        for name, value in {**own, **place, "output": output}.items():
            words += flag_words(name, value)
        scope = frozenset(names).union(*(cell.scope for cell in needs))
        return Cell(kind, folder, own, tuple(words), before, scope)


def _content(name: str, value: Any) -> Any:
    """A value as it is hashed: a file or a folder by what it holds, so that a study can move."""
    if isinstance(value, list):
        return [_content(name, part) for part in value]
    is_huge = isinstance(value, int) and abs(value) >= 2**63
    if is_huge or not isinstance(value, (str, int, float)):
        raise ConfigError(f"`{name}` of a study must be a text or a number, got {value!r:.60}")
    if name not in FILES:
        return value
    try:
        path = Path(str(value))
        return _sha256(path.resolve()) if path.exists() else value
    except OSError as error:
        raise ConfigError(f"`{name}` of a study must be a path or a name: {error}") from error


@cache
def _sha256(path: Path) -> str:
    """Hash of a file, or of all files of a folder and their names."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return json_sha256([[str(file.relative_to(path)), _sha256(file)] for file in files])
