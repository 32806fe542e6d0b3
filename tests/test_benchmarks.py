# SPDX-License-Identifier: Apache-2.0
"""Scripts for machines that tests do not have still run."""

import json
import subprocess
from pathlib import Path

import pytest

import preloaded
from commands import with_path

ROOT = Path(__file__).resolve().parents[1]
NUM_MODULES = 28


def measured(what, fraction=1.0, place="upper"):
    case = {"shape": "tiny", "tokens": 16, "what": what, "fraction": fraction, "place": place}
    command = [preloaded.python(), "-W", "ignore", "-m", "benchmarks.gpu", "--output", "unused"]
    command += ["--steps", "1", "--case", json.dumps(case)]
    out = subprocess.check_output(command, text=True, cwd=ROOT, env=with_path())
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize(
    ("what", "num_trained"), [("mask", NUM_MODULES), ("bare", 0), ("full", 4 * 36_864)]
)
def test_the_script_for_accelerators_trains_what_it_says(what, num_trained):
    found = measured(what)
    assert found["num_trained"] == num_trained
    assert found["tokens_per_second"] > 0


def test_a_4_bit_base_and_a_selection_run_too():
    pytest.importorskip("bitsandbytes", reason="4-bit bases need bitsandbytes")
    whole, part = measured("lora, 4 bits"), measured("lora, 4 bits", 0.3, "spread")
    assert part["num_trained"] < 0.5 * whole["num_trained"]
