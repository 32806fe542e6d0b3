# SPDX-License-Identifier: Apache-2.0
"""Docs hold: numbers come from records, commands and files that they name exist."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

import keylayers
from keylayers.cli import COMMANDS, app, main
from keylayers.ranking.ranking import FILE as RANKING
from keylayers.ranking.ranking import Ranking
from keylayers.scores.scoring_options import scoring_options

from rankings import ranking_of

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_every_table_of_the_pages_comes_from_the_records(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import pages
    from tables import filled

    texts = {path: path.read_text() for path in pages.PAGES}
    for make in pages.TABLES:
        mark = f"<!-- {make.__name__} -->"
        assert sum(mark in text for text in texts.values()) == 1, make.__name__
    for text in texts.values():
        assert filled(text, pages.TABLES) == text


def test_the_default_is_better_than_leave_one_out_and_every_rival_at_a_fifth_of_the_cost(
    monkeypatch,
):
    """What the README says, recomputed from the record."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    import findings

    assert scoring_options().method == "elimination"
    table = findings.scored()
    areas = findings.mean_areas(table)
    assert areas.index[0] == ("elimination", "held-out")
    cost = table.groupby("method")["forward_equivalents"].first()
    assert cost["elimination"] <= cost["leave-one-out"] / 5
    for group in findings.GROUPS.values():
        means = areas[group].mean(axis=1)
        assert means["elimination", "held-out"] < means["leave-one-out", "train"]


def test_the_readme_is_short_and_its_links_exist():
    assert len(README.splitlines()) <= 80
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert "docs/images/real.svg" in targets
    for target in targets:
        assert (ROOT / target).exists(), target


# From TRL's own defaults: the example has to stay what a user would write.
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
def test_the_example_of_the_callback_runs(tmp_path, monkeypatch, capsys):
    """As it is printed, in a folder of its own."""
    text = (ROOT / "docs" / "callback.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(example, "docs/callback.md", "exec"), names)
    assert "frozen after step " in capsys.readouterr().out
    callback = names["callback"]
    ranking = Ranking.load("ranking.json")
    assert len(ranking.modules) == 56
    assert len(callback.frozen) == 14
    assert Ranking.load("run/checkpoint-20") == ranking


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")
def test_the_example_of_a_script_runs(tiny, preferences, tmp_path, monkeypatch):
    text = (ROOT / "docs" / "script.md").read_text()
    (example,) = re.findall(r"```python\n(import keylayers\nfrom .*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(tiny / "model")
    (tmp_path / "pairs.jsonl").symlink_to(preferences / "pairs.jsonl")
    names: dict[str, object] = {}
    exec(compile(example, "docs/script.md", "exec"), names)
    chosen = names["ranking"].select(0.3).names
    assert chosen
    assert names["ranking"].provenance["reference"] == "base"
    assert names["config"].r == 16
    assert all(re.fullmatch(names["config"].target_modules, name) for name in chosen)


def test_the_architecture_names_every_folder_and_only_files_that_exist():
    text = (ROOT / "docs" / "architecture.md").read_text()
    source = ROOT / "src" / "keylayers"
    for path in source.iterdir():
        if path.is_dir() and not path.name.startswith("__"):
            assert f"`{path.name}/`" in text, path.name
    for name in re.findall(r"`([a-z_/]+\.py)`", text):
        assert (source / name).is_file() or (ROOT / name).is_file(), name


COMMAND = re.compile(r"^(?:    |\$ )(keylayers (?:.*\\\n)*.*)$", re.MULTILINE)
SHOWN = sorted(
    {
        " ".join(shlex.split(line.replace("\\\n", " "), comments=True))
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for line in COMMAND.findall(page.read_text())
    }
)


@pytest.mark.parametrize("command", SHOWN)
def test_commands_of_the_docs_parse(command, tmp_path, monkeypatch):
    command = command.split()
    options = {"model": "base", "data": "chats.jsonl"}
    monkeypatch.chdir(tmp_path)
    for name, value in pairwise(["--ranking", "out", *command]):
        if name == "--ranking":
            (tmp_path / value).mkdir(parents=True, exist_ok=True)
            ranking_of([1.0], provenance={"options": options}).save(tmp_path / value / RANKING)
    function, bound, _ = app.parse_args(command[1:], print_error=False, exit_on_error=False)
    assert function.__name__.rstrip("_") == command[1]
    assert bound.arguments or len(command) == 2


def test_help_shows_examples_as_code_and_is_that_of_the_whole(capsys):
    for name, text in COMMANDS.items():
        assert app[name].default_command.__doc__.splitlines()[0] == text
        assert main([name, "--help"]) == 0
        printed = capsys.readouterr().out
        assert f"keylayers {name}" in printed.partition("Examples")[2], name
        assert "```" not in printed, name


def test_the_version_is_in_the_changelog():
    assert f"## {keylayers.__version__}" in (ROOT / "CHANGELOG.md").read_text()
