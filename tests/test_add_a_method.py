# SPDX-License-Identifier: Apache-2.0
"""A method from outside the package, as docs/add-a-method.md has it."""

import json
import re
import subprocess
from dataclasses import make_dataclass
from pathlib import Path

import pytest

import keylayers
import preloaded
from commands import QUICK
from keylayers.scores import methods
from scored import noisy

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "add-a-method.md").read_text()
FILE, IN_PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
CODE = "import sys; from keylayers.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture
def table(monkeypatch):
    """The table of methods, as it was before once the test ends."""
    monkeypatch.setattr(methods, "_METHODS", dict(methods.methods()))
    return methods.methods


@pytest.fixture
def package(tmp_path):
    """A folder with the page's file as an installed package."""
    info = tmp_path / "site" / "slope-1.0.dist-info"
    info.mkdir(parents=True)
    (info.parent / "slope.py").write_text(FILE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slope\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[keylayers.methods]\nslope = slope:SLOPE\n")
    return info.parent


def in_process(folder, *arguments):
    """The command line in a process that finds the packages in `folder`."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); {CODE}"
    command = [preloaded.python(), "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line_ranks_by_a_method_of_another_package(package, tiny, tmp_path):
    shown = " ".join(in_process(package, "rank", "--help").stdout.replace("│", " ").split())
    assert "--at-gate FLOAT Value of all gates where the slope is taken. For slope." in shown
    assert re.search(r"--mask-batches INT [^\[]*, cka, slope\.", shown)
    output = tmp_path / "out"
    start = ("rank", "--model", tiny / "model", "--data", tiny / "data.jsonl", "--output", output)
    done = in_process(package, *start, *QUICK, "--method", "slope", "--at-gate", "0.25")
    assert done.returncode == 0, done.stderr
    ranking = json.loads((output / "ranking.json").read_text())
    assert ranking["method"] == "slope"
    recorded = ranking["provenance"]["options"]
    assert (recorded["method"], recorded["at_gate"], recorded["mask_batches"]) == ("slope", 0.25, 2)
    assert len(ranking["provenance"]["mask"]["losses"]) == 2
    refused = in_process(package, *start, "--method", "ila", "--at-gate", "0.1")
    assert "`at_gate` must be left out with `method` ila" in refused.stderr
    without = in_process(tmp_path, "show", output)  # the package is needed to rank, not to read
    assert without.returncode == 0
    assert "slope, one gate per module" in without.stdout


def test_a_registered_method_ranks_in_python_and_inside_a_run(table, tmp_path, monkeypatch):
    (tmp_path / "slope.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    namespace = {"trainer": noisy()}
    exec(IN_PYTHON, namespace)
    ranking = namespace["ranking"]
    assert ranking.provenance["options"]["at_gate"] == 0.25
    assert ranking.provenance["options"]["price"] == 2.0  # as in every record
    path = keylayers.rank_modules(noisy(), "path", path_points=1)
    half = keylayers.rank_modules(noisy(), "slope")
    assert [one.score for one in half.modules] == pytest.approx([one.score for one in path.modules])
    assert keylayers.FreezeUnimportant(method="slope", at_gate=0.1).decisive()


UNUSABLE = [
    ("ila", [], "'ila' is that of keylayers.scores.ila:ila"),
    ("other", [("mask_batches", int, 8)], "`mask_batches` of method other must have type and def"),
    ("other", [("mask_seed", int, 0)], "got `mask_seed`"),
]


@pytest.mark.parametrize(("name", "options", "message"), UNUSABLE)
def test_a_method_that_collides_with_another_is_refused(name, options, message, table):
    method = keylayers.Method(name, "", "module:function", make_dataclass("Options", options))
    with pytest.raises(keylayers.KeylayersError, match=message):
        keylayers.register_method(method)
    assert "other" not in table()


BROKEN = {
    "import no_such_module": "the method slope cannot be loaded from slope:SLOPE",
    "SLOPE = 1": "the entry point slope:SLOPE must be a keylayers.Method, got 1",
}


@pytest.mark.parametrize(("file", "message"), BROKEN.items())
def test_a_package_that_is_broken_is_named(package, file, message):
    (package / "slope.py").write_text(file)
    done = in_process(package, "rank", "--help")
    assert done.returncode == 2
    assert message in done.stderr
