# SPDX-License-Identifier: Apache-2.0
"""What SECURITY.md promises of studies: names stay names, and no password is taken."""

import re

import pandas as pd
import pytest
import yaml

from commands import keylayers

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "../../outside",
    "/etc/passwd",
    "[/red] [link=https://evil.example]",
    "{{ 7 * 7 }} {% raw %}",
    "\x1b[31mred\x1b]0;title\x07",
    "a\nb\r\tc",
    "=cmd|' /C calc'!A0",
    "\u202egpj.exe",
]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A study whose axes and entries have hostile names, every cell of which failed or is done."""
    from keylayers.commands.study.cell import CellState
    from keylayers.commands.study.plan import plan
    from keylayers.commands.study.yaml_file import StudyFile

    content = {"options": {"model": HOSTILE[0], "data": HOSTILE[1]}}
    content["grid"] = {
        HOSTILE[0]: [{"name": label, "seed": n} for n, label in enumerate(HOSTILE)],
        HOSTILE[4]: [{"name": label, "lora_rank": n} for n, label in enumerate(HOSTILE[4:6], 1)],
    }
    content["grid"][HOSTILE[2]] = [{"name": HOSTILE[3], "max_steps": 3}]
    study = StudyFile.of(content, "it")
    root = tmp_path_factory.mktemp("root") / "in"
    cells = plan(study, root)
    states = {
        cell.name: CellState("failed", HOSTILE[index % len(HOSTILE)])
        for index, cell in enumerate(cells)
    }
    return study, cells, states, root


def test_cells_are_named_by_hashes_whatever_the_study_calls_them(planned):
    _, cells, _, root = planned
    from keylayers.commands.study.cell import folder_of

    assert len(cells) > len(HOSTILE)
    for cell in cells:
        assert re.fullmatch(r"(stage-1|ranking|verification|training)-[0-9a-f]{12}", cell.name)
        assert folder_of(root, cell).resolve().parent == root.resolve() / "cells"


@pytest.fixture
def results(planned):
    """The table that such a study gives, with an area for each of its rankings."""
    from keylayers.commands.study.table import results_table

    study, cells, states, root = planned
    table = results_table(root, cells, states, list(study.grid))
    is_ranking = table["kind"] == "ranking"
    table["measure"] = table["measure"].astype(object).where(~is_ranking, "area")
    table["value"] = table["value"].where(~is_ranking, 0.5)
    return table


def test_a_report_shows_hostile_names_as_text(planned, results):
    pytest.importorskip("altair")
    from markupsafe import escape

    from keylayers.commands.study.report import render_study

    study, cells, states, _ = planned
    page = render_study(results, list(study.grid), cells, states).decode()
    for text in HOSTILE[:6]:
        assert str(escape(text)) in page
    axes = [*study.grid]
    row = {axes[0]: None, **dict.fromkeys(axes[1:], HOSTILE[4]), "best": 0.3, "tau": 0.5}
    row |= {"differs": axes[0], "first": HOSTILE[0], "second": HOSTILE[1]}
    row |= {"jaccard": 1.0, "chance_jaccard": 0.2}
    compared_page = render_study(results, axes, cells, states, pd.DataFrame([row])).decode()
    assert "Agreement of rankings" in compared_page
    for one in (page, compared_page):
        assert "<script" not in one
        assert "<img src=x" not in one


def test_the_terminal_shows_hostile_names_as_text(planned, results, capsys):
    from rich.console import Console

    from keylayers.commands.study.tables import outcome_line, progress_table, summary_tables

    study, cells, states, _ = planned
    console = Console(width=2000, force_terminal=True, highlight=False)
    for one in summary_tables(results, list(study.grid)):
        console.print(one)
    console.print(progress_table(cells, states, lambda cell: HOSTILE[4]))
    for cell in cells:
        console.print(outcome_line(cell, states[cell.name]), markup=False)
    shown = capsys.readouterr().out
    assert HOSTILE[4] in shown
    assert "\x1b[31mred" not in shown
    assert "\x1b]0;" not in shown


# Words with a password in an address: flags of several commands, and what a study file may hold.
ADDRESS = "https://somebody:hunter2@host.example/x"
WITH_PASSWORD = [
    ("rank", "--model", ADDRESS, "--data", "d"),
    ("rank", "--model", "m", "--data", ADDRESS),
    ("train", f"--ranking={ADDRESS}"),
    ("study", "study.yaml", "--ray-address", "ray://somebody:hunter2@127.0.0.1:10001"),
    ("study", "study.yaml", "--set", f"model={ADDRESS}"),
    ("study", "with-password.yaml"),
    ("rank", "--config", "run.yaml"),
]


@pytest.mark.parametrize("words", WITH_PASSWORD, ids=" ".join)
def test_a_password_in_an_address_is_refused_and_not_repeated(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sound = {"options": {"model": "m", "data": "d"}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(sound))
    (tmp_path / "with-password.yaml").write_text(yaml.safe_dump({"options": {"model": ADDRESS}}))
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": "m", "data": ADDRESS}))
    before = set(tmp_path.rglob("*"))
    assert keylayers(*words) == 2
    told = "".join(capsys.readouterr())
    assert "must hold no password" in told
    assert "hunter2" not in told
    assert set(tmp_path.rglob("*")) == before
