# SPDX-License-Identifier: Apache-2.0
"""Inputs that people really have and that once went wrong (../shared/cases) come out right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.long
def test_every_case_holds(shared):
    run = shared / "cases" / "run"
    if not run.is_file():
        pytest.skip("needs ../shared/cases, which is not here")
    own = {"KL": str(Path(sys.executable).with_name("keylayers")), "PY": sys.executable}
    path = os.pathsep.join(part for part in sys.path if part)
    done = subprocess.run(
        [run], capture_output=True, text=True, env={**os.environ, **own, "PYTHONPATH": path}
    )
    wrong = [line for line in done.stdout.splitlines() if not line.startswith("ok ")]
    assert done.returncode == 0, "\n".join(wrong)
    assert wrong[-1].endswith("cases hold")
