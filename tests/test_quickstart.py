# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/quickstart.md print what the page shows.

`...` on the page matches any text. Times are ignored. Numbers with decimals may differ by 0.01,
because processors round differently.
"""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest

from commands import keylayers

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "quickstart.md").read_text()
BLOCKS = re.findall(r"```console\n\$ keylayers (.*?)(?<!\\)\n(.*?)```", PAGE, re.DOTALL)
# What the page shows -> what a run may print there; the first that fits
LOOSE = {
    r"\.\.\.\n?": ".*",
    r"\d+ s\b": r"\d+ s",
    r"\d+\.\d+": r"(\d+\.\d+)",
    r"[█▉▊▋▌▍▎▏]+": r"[█▉▊▋▌▍▎▏]+",
    r"\s+": r"\s+",
}


def pattern(shown):
    """A regular expression for a whole output, with a group for each number with decimals."""
    either = re.compile("|".join(f"({one})" for one in LOOSE) + "|(.)", re.DOTALL)
    forms = [*LOOSE.values()]

    def loosened(match):
        return re.escape(match[0]) if match[len(forms) + 1] else forms[match.lastindex - 1]

    return re.compile(either.sub(loosened, shown), re.DOTALL)


@pytest.mark.long
def test_the_commands_of_the_quickstart_print_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [command.split()[0] for command, _ in BLOCKS]
    assert names == ["demo", "rank", "verify", "train", "prune"]
    for command, shown in BLOCKS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            assert keylayers(*shlex.split(command.replace("\\\n", " "))) == 0
        found = pattern(shown).fullmatch(printed.getvalue())
        assert found, f"{command} must print\n{shown}\nbut prints\n{printed.getvalue()}"
        wanted = [float(number) for number in re.findall(r"\d+\.\d+", shown)]
        assert [float(number) for number in found.groups()] == pytest.approx(wanted, abs=0.01)
