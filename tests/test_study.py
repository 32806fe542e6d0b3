# SPDX-License-Identifier: Apache-2.0
"""`keylayers study`: cells run once, shared work once, failures recorded, tidy results."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest

import preloaded
from commands import everything_below, keylayers, listing, with_path
from keylayers.commands.study_cells import Cell
from keylayers.commands.study_results import agreement_means, agreement_table
from keylayers.commands.study_workers import run_cell, state_of
from keylayers.files import one_at_a_time
from keylayers.ranking.compare import chance_jaccard
from outputs import differences
from studies import METHODS, finished, plan_of, run_here, tiny_study, write
from test_security import NAMES, SECRET

from rankings import ranking_of

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "../../outside",
    "[/red] [link=https://evil.example]",
    "\x1b[31mred\x1b]0;title\x07",
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """A finished study in the folder `whole`, and its file."""
    place = tmp_path_factory.mktemp("study")
    path = tiny_study(place, tiny, seed=[0, 1], method=METHODS, budget=[0.2, 1.0])
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(place):
        for name in NAMES:
            patch.setenv(name, SECRET)
        assert run_here(patch, path, "--output", "whole") == 0
    return place, path


def test_results_are_one_tidy_table_and_a_page_and_hold_no_key(done):
    place, path = done
    whole = place / "whole"
    table = pd.read_parquet(whole / "results.parquet")
    read = pd.read_csv(whole / "results.csv", dtype={"seed": str, "budget": str})
    pd.testing.assert_frame_equal(table.drop(columns="error"), read.drop(columns="error"))
    axes = ["seed", "method", "budget"]
    assert [*table] == ["cell", "kind", "status", "error", *axes, "measure", "value", "unit"]
    assert set(table["status"]) == {"finished"}
    measured = {kind: set(rows["measure"]) - {"wall_time"} for kind, rows in table.groupby("kind")}
    assert measured == {
        "stage-1": {"steps", "held_out_loss_base", "held_out_loss_tuned"},
        "ranking": {"scoring_time", "scoring_passes"},
        "verification": {"area", "area_of_random_orders"},
        "training": {"held_out_loss", "held_out_loss_base", "modules", "trained_parameters"},
    }
    losses = table[table["measure"] == "held_out_loss"]
    assert len(losses) == 8
    # one training of all modules serves both methods
    assert losses[losses["budget"] == "1.0"].groupby("seed")["cell"].nunique().eq(1).all()
    for cell in plan_of(path, "whole"):
        record = json.loads((whole / "cells" / cell.name / "cell.json").read_text())
        assert record["command"] == list(cell.words)
    page = (whole / "report.html").read_text()
    own = (table["measure"] == "area") & (table["method"] == "gradient-norm")
    assert f"{table[own]['value'].mean():.4f}" in page
    assert "path, path_points 2, mask_batches 2" in page
    assert page.count("data:image/png;base64,") == 2
    files = everything_below(whole)
    assert {"cell.json", "log.txt", "study.json", "report.html"} <= {path.name for path in files}
    assert not [path for path, content in files.items() if SECRET.encode() in content]


def test_a_finished_study_runs_only_new_entries(done, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(done[0])
    before = listing(Path("whole/cells"))
    wider = tiny_study(tmp_path, tiny, seed=[0, 1], method=METHODS, budget=[0.2, 0.5, 1.0])
    assert run_here(monkeypatch, wider, "--output", "whole") == 0
    after = listing(Path("whole/cells"))
    assert {path: after[path] for path in before} == before
    new = {path.name for path in after if path not in before and path.parent.name == "cells"}
    assert [name.split("-")[0] for name in new] == ["training"] * 4


def test_a_failed_cell_is_recorded_and_tried_again(tiny, tmp_path, monkeypatch, capsys):
    data = [str(tiny / "data.jsonl"), str(tmp_path / "absent.jsonl")]
    words = (tiny_study(tmp_path, tiny, data=data, budget=[0.3]), "--output", "out")
    assert run_here(monkeypatch, *words) == 1
    told = capsys.readouterr()
    assert "4 of 8 cells finished" in told.out
    assert "every cell must finish" in told.err
    table = pd.read_csv("out/results.csv").set_index("data")
    lost = table.loc["absent.jsonl"]
    assert sorted(lost["status"]) == ["failed", "skipped", "skipped", "skipped"]
    assert lost[lost["status"] == "failed"]["error"].str.contains("absent.jsonl").all()
    assert set(table.loc["data.jsonl", "status"]) == {"finished"}
    assert "absent.jsonl" in Path("out/report.html").read_text()
    Path("absent.jsonl").write_bytes((tiny / "data.jsonl").read_bytes())
    with one_at_a_time(tmp_path / "out"):
        assert run_here(monkeypatch, *words) == 2
    assert "one run at a time must write to" in capsys.readouterr().err
    assert run_here(monkeypatch, *words) == 0


def test_whatever_a_command_raises_is_an_error_of_its_cell(tmp_path, monkeypatch):
    cell = Cell("ranking", tmp_path / "ranking-a", {}, ("rank",))
    main = Mock(side_effect=[RuntimeError("out of\nmemory"), SystemExit(0), 0])
    monkeypatch.setattr("keylayers.cli.main", main)
    for error in ("RuntimeError: out of memory", "SystemExit: 0"):
        assert run_cell(cell).error == error
        assert state_of(cell).status == "failed"
    assert run_cell(cell).status == "finished"
    assert state_of(cell).status == "waiting"  # its results are gone
    cell.result.write_text("{}")
    assert state_of(cell).status == "finished"


def test_several_files_share_cells_compare_and_evaluate(tiny, tmp_path, monkeypatch, capsys):
    options = {"model": str(tiny / "model"), "data": str(tiny / "data.jsonl"), "save_steps": 0}
    options |= {"lora_rank": 4, "max_steps": 3, "steps": 3, "method": "update-norm", "epsilon": 0.0}
    seeds, parts = {"seed": [0, 1]}, {"options": options, "verify": False}
    first = write(tmp_path, "first", **parts, grid=seeds | {"budget": [0.3]}, compare=[0.3, 0.75])
    forgetting = {"forgetting_data": str(tiny / "data.jsonl"), "forgetting_examples": 8}
    grid = seeds | {"budget": [0.3, 1.0]}
    second = write(tmp_path, "second", **parts, grid=grid, evaluate=forgetting)
    assert run_here(monkeypatch, first, second, "--output", "out") == 0
    out = capsys.readouterr().out
    assert "Agreement of rankings" in out
    assert "forgetting: loss" in out
    pairs = pd.read_csv("out/first/agreement.csv")
    assert pairs[["differs", "best"]].values.tolist() == [["seed", 0.3], ["seed", 0.75]]
    table = pd.read_csv("out/second/results.csv").set_index("measure")
    assert table.loc["forgetting: loss", "kind"].tolist() == ["evaluation"] * 4
    assert table.loc["forgetting: loss, base model", "value"].nunique() == 1
    assert set(pd.read_csv("out/first/results.csv")["cell"]) < set(table["cell"])
    assert len(list(Path("out/cells").iterdir())) == table["cell"].nunique()


def test_rankings_that_differ_in_one_axis_are_compared(tmp_path):
    orders = {"x0": [4, 3, 2, 1], "x1": [4, 3, 1, 2], "y0": [1, 2, 3, 4], "f1": [1, 1, 1, 1]}
    cells = []
    for (data, seed), scores in orders.items():
        point = {"data": data, "seed": seed}
        cells.append(Cell("ranking", tmp_path / f"ranking-{data}{seed}", {}, (), points=(point,)))
        cells[-1].folder.mkdir()
        ranking_of([float(score) for score in scores]).save(cells[-1].result)
    axes, chance = ["data", "seed"], chance_jaccard(4, 2, 2)
    names = ["differs", "first", "second", *axes, "jaccard", "chance_jaccard", "tau"]
    table = agreement_table(cells, axes, [0.5])[names].astype(object)
    assert table.where(table.notna(), None).values.tolist() == [
        ["seed", "0", "1", "x", None, 1.0, chance, pytest.approx(2 / 3)],
        ["data", "x", "y", None, "0", 0.0, chance, -1.0],
        ["data", "x", "f", None, "1", None, None, None],  # all its scores are equal
    ]
    means = agreement_means(agreement_table(cells[:3], axes, [0.5]), axes).set_index("differs")
    assert means.loc["seed", ["first", "second"]].tolist() == ["any", "any"]


def test_hostile_names_stay_names(tmp_path, monkeypatch, capsys):
    entries = [{"name": label, "seed": n} for n, label in enumerate(HOSTILE)]
    path = write(tmp_path, options={"model": "m", "data": "no"}, grid={HOSTILE[0]: entries})
    assert keylayers("study", path, "--dry-run") == 0
    assert run_here(monkeypatch, path, "--output", "out") == 1
    page = Path("out/report.html").read_text()
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "\x1b" not in "".join(capsys.readouterr())
    labels = {re.sub("[\x1b\x07]", "\ufffd", label) for label in HOSTILE}
    assert set(pd.read_csv("out/results.csv")[HOSTILE[0]]) == labels
    for cell in Path("out/cells").iterdir():
        assert re.fullmatch(r"stage-1-[0-9a-f]{12}", cell.name)


def start(place, path, output, *more):
    """A study in a process of its own."""
    words = ["study", str(path), "--output", output, *(more or ("--workers", "2"))]
    code = f"import sys; from keylayers.cli import main; sys.exit(main({words!r}))"
    with (place / f"{output}.log").open("w") as log:
        command = [preloaded.python(), "-W", "ignore", "-c", code]
        return subprocess.Popen(command, cwd=place, env=with_path(), stdout=log, stderr=log)


@pytest.mark.long
def test_a_killed_study_ends_as_if_it_had_not_been(done):
    """With workers, which make what this process makes; the first kill is in stage 1."""
    place, path = done
    for num_cells in (0, 5):  # have ended when it is killed
        process = start(place, path, "broken")
        while process.poll() is None:
            ended, begun = ([*place.glob(f"broken/cells/*/{n}")] for n in ("cell.json", "log.txt"))
            if len(ended) >= num_cells and begun:
                break
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert start(place, path, "broken").wait() == 0
    assert differences(*(finished(place / n, plan_of(path)) for n in ("whole", "broken"))) == []


WORKERS = """
import os, signal, sys
from pathlib import Path
import keylayers.cli
from keylayers.commands import study_workers
from keylayers.commands.study_cells import Cell
from keylayers.errors import KeylayersError

def main(words):
    assert "torch" not in sys.modules or not words  # the device is chosen before it is imported
    if words[0] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    raise KeylayersError(os.environ["CUDA_VISIBLE_DEVICES"])
keylayers.cli.main = main

if __name__ == "__main__":
    import torch
    torch.accelerator.is_available = lambda: True
    torch.accelerator.device_count = lambda: 2
    os.environ["CUDA_VISIBLE_DEVICES"] = "4,GPU-7"
    words = ("die", "a", "b", "c")
    cells = [Cell("ranking", Path(sys.argv[1]) / word, {}, (word,)) for word in words]
    with study_workers.local(None) as submit:
        states = study_workers.run_cells(cells, submit)
    print(*(state.error for state in states.values()), sep="\\n")
"""


@pytest.mark.long
def test_each_worker_has_one_accelerator_and_one_that_dies_takes_one_cell_with_it(tmp_path):
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    command = [sys.executable, "-W", "ignore", script, tmp_path / "out"]
    ran = subprocess.run(command, env=with_path(), capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    dead, *others = ran.stdout.splitlines()
    assert "its process died" in dead
    assert set(others) == {"4", "GPU-7"}
    assert len(others) == 3


CLUSTER = """
import ray, sys
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=10**8)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.mark.long
def test_a_ray_cluster_gives_the_same(done, tiny, monkeypatch):
    pytest.importorskip("ray")
    place, _ = done
    path = tiny_study(place / "more", tiny, seed=[0], method=METHODS[:1], budget=[0.2])
    # The switch by which Ray keeps to 127.0.0.1; client and cluster must agree.
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)  # which only the environment hands over
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    cluster = subprocess.Popen([sys.executable, "-c", CLUSTER], env=with_path(), **pipes)
    try:
        address = cluster.stdout.readline().strip()
        assert re.fullmatch(r"127\.0\.0\.1:\d+", address)
        assert start(place, path, "on-ray", "--ray-address", address).wait() == 0
    finally:
        cluster.communicate("", timeout=60)
    assert differences(*(finished(place / n, plan_of(path)) for n in ("whole", "on-ray"))) == []
    files = everything_below(place / "on-ray")
    assert not [path for path, content in files.items() if SECRET.encode() in content]
