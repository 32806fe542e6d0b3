# SPDX-License-Identifier: Apache-2.0
"""Study files for tests, and a way to run their cells in the process of the test."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from commands import keylayers
from keylayers.commands.study_cells import plan
from keylayers.commands.study_grid import read_study
from keylayers.commands.study_workers import run_cell
from outputs import contents

OPTIONS = {"batch_size": 4, "lora_rank": 4, "max_steps": 6, "learning_rate": 0.02, "points": 4}
OPTIONS |= {"save_steps": 2, "random_orders": 2}
METHODS = ["gradient-norm", {"method": "path", "path_points": 2, "mask_batches": 2}]


def write(folder, name="study", **content):
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def tiny_study(folder, tiny, options=None, **grid):
    inputs = {"model": str(tiny / "model"), "data": str(tiny / "data.jsonl")}
    return write(folder, options={**inputs, **OPTIONS, **(options or {})}, grid=grid)


def plan_of(path, root="study"):
    """The cells of a study file."""
    return _plan(yaml.safe_load(path.read_text(encoding="utf-8")), root)


def planned(grid=None, settings=(), parts=None, **options):
    """Kind -> cells of a study without files, each after what it needs."""
    content = {"options": {"model": "m", "data": "d"} | options, "grid": grid or {}}
    found, before = {}, set()
    for cell in _plan(content | (parts or {}), "out", settings):
        assert set(cell.needs) <= before
        before.add(cell.name)
        found.setdefault(cell.kind, []).append(cell)
    return found


def _plan(content, root, settings=()):
    return plan(read_study(content, "it", settings), Path(root))


@contextlib.contextmanager
def in_this_process(_workers=None):
    """In place of the workers of a study."""

    def submit(cell):
        with ThreadPoolExecutor(1) as thread:  # one cell after the other
            return thread.submit(run_cell, cell)

    yield submit


def run_here(monkeypatch, *words):
    """The exit code of `keylayers study`."""
    monkeypatch.setattr("keylayers.commands.study_workers.local", in_this_process)
    return keylayers("study", *words)


def finished(root, cells):
    """Path -> what the cells hold, without logs and without the place of the study."""
    return {
        f"{cell.name}/{path}": str(held).replace(f"{root.name}/cells", "cells")
        for cell in cells
        for path, held in contents(root / "cells" / cell.name).items()
        if path != "log.txt"
    }
