# SPDX-License-Identifier: Apache-2.0
"""Study files that are run together: each with results of its own, all with the same cells."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keylayers.commands.study.agreement import MEASURES, PAIR
from keylayers.commands.study.plan import CELLS, Cell, plan
from keylayers.commands.study.summary import MEANS
from keylayers.commands.study.table import FIXED, MEASURED
from keylayers.commands.study.yaml_file import StudyFile, with_settings
from keylayers.errors import ConfigError

# Columns of what a study writes and shows, beside those that its axes are named after.
OF_AGREEMENT = (*PAIR, "best", *MEASURES, "pairs", "lowest", "highest")
COLUMNS = (*FIXED, *MEASURED, *MEANS, *OF_AGREEMENT)


@dataclass(frozen=True)
class PlannedStudy:
    """One study file and what it takes.

    Attributes:
        name: Of the file, without `.yaml`.
        folder: Where its results go.
        study: What it asks for.
        cells: Each after those that it needs.
    """

    name: str
    folder: Path
    study: StudyFile
    cells: Sequence[Cell]


def plan_files(
    contents: Mapping[Path, Mapping[str, Any]], root: Path, settings: Sequence[str] = ()
) -> list[PlannedStudy]:
    """The studies of several files; of a single one the results are in `root` itself.

    Args:
        contents: File -> what its YAML holds.
        root: Folder of the cells that they share, and of their results.
        settings: `name=value` for options that are given anew, in all of them.

    Raises:
        ConfigError: a file cannot be run, or two have the same name.
    """
    studies: dict[str, PlannedStudy] = {}
    for path, content in contents.items():
        name = path.stem
        if len(contents) > 1 and (name in studies or name in (CELLS, ".", "..")):
            raise ConfigError(
                f"study files that are run together must have names of their own, other than "
                f"{CELLS}, for their results are named after them; got {str(path)!r}; rename it"
            )
        study = StudyFile.of(with_settings(content, settings), str(path))
        _check_axes(study)
        folder = root / name if len(contents) > 1 else root
        studies[name] = PlannedStudy(name, folder, study, plan(study, root))
    return list(studies.values())


def _check_axes(study: StudyFile) -> None:
    for axis in study.grid:
        if axis in COLUMNS:
            raise ConfigError(
                f"no axis of a study must be named as a column of its results ({', '.join(COLUMNS)}"
                f"), got {axis!r}; name it otherwise"
            )


def shared_cells(studies: Sequence[PlannedStudy]) -> list[Cell]:
    """The cells of all studies, each once and after those that it needs."""
    found: dict[str, Cell] = {}
    for one in studies:
        for cell in one.cells:
            found.setdefault(cell.name, cell)
    return list(found.values())
