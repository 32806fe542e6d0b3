# SPDX-License-Identifier: Apache-2.0
"""`keylayers study`: every combination once, shared work once, failures recorded, tidy results."""

import contextlib
import ipaddress
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml

import preloaded
from commands import everything_below, keylayers
from outputs import contents, differences
from test_security import NAMES, SECRET

OPTIONS = {
    "batch_size": 4,
    "lora_rank": 4,
    "max_steps": 6,
    "learning_rate": 0.02,
    "save_steps": 2,
    "random_orders": 2,
    "points": 4,
}
METHODS = ["gradient-norm", {"method": "path", "path_points": 2, "mask_batches": 2}]


def study_file(folder, tiny, options=None, **grid):
    """study.yaml in `folder`."""
    folder.mkdir(exist_ok=True)
    content = {
        "options": {"model": str(tiny / "model"), "data": str(tiny / "data.jsonl"), **OPTIONS},
        "grid": grid,
    }
    content["options"] |= options or {}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def plan_of(path, root=Path("study")):
    from keylayers.commands.study.plan import plan
    from keylayers.commands.study.yaml_file import StudyFile

    return plan(StudyFile.of(yaml.safe_load(path.read_text()), str(path)), root)


@pytest.fixture(scope="module")
def done(tiny, tmp_path_factory):
    """A finished study in the folder `whole` of this place, with its file."""
    place = tmp_path_factory.mktemp("study")
    path = study_file(place, tiny, seed=[0, 1], method=METHODS, budget=[0.2, 1.0])
    assert run(place, path, "whole").wait() == 0
    return place, path


def run(place, path, output, *more):
    """A study in a process of its own, with processes below it, and secrets in its environment."""
    words = ["study", str(path), "--output", output, *(more or ("--workers", "2"))]
    code = f"import sys; from keylayers.cli import main; sys.exit(main({words!r}))"
    environment = {**os.environ, **dict.fromkeys(NAMES, SECRET)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with (place / f"{output}.log").open("w") as log:
        command = [preloaded.python(), "-W", "ignore", "-c", code]
        return subprocess.Popen(command, cwd=place, env=environment, stdout=log, stderr=log)


@pytest.mark.long
def test_results_are_tidy_and_say_what_chance_gives(done):
    place, path = done
    table = pd.read_parquet(place / "whole" / "results.parquet")
    read = pd.read_csv(place / "whole" / "results.csv", dtype={"seed": str, "budget": str})
    pd.testing.assert_frame_equal(table.drop(columns="error"), read.drop(columns="error"))
    assert table["error"].isna().all()
    assert list(table.columns) == [
        *("cell", "kind", "status", "error", "seed", "method", "budget"),
        *("measure", "value", "unit"),
    ]
    assert set(table["status"]) == {"finished"}
    areas = table[table["measure"] == "area"]
    assert len(areas) == 4
    chance = table[table["measure"] == "area_of_random_orders"]
    assert len(chance) == 4
    # the random orders are the same for rankings of one update
    assert chance.groupby("seed")["value"].nunique().eq(1).all()
    losses = table[table["measure"] == "held_out_loss"]
    assert len(losses) == 8
    # one training of all modules serves both methods
    assert losses[losses["budget"] == "1.0"].groupby("seed")["cell"].nunique().eq(1).all()
    for cell in plan_of(path, Path("whole")):
        record = json.loads((place / "whole" / "cells" / cell.name / "cell.json").read_text())
        assert record["state"]["status"] == "finished"
        assert record["commands"] == [list(command) for command in cell.commands]
    log = (place / "whole.log").read_text()
    assert "Area under the mask curve" in log
    assert "random orders" in log
    assert "Held-out loss after training" in log


@pytest.mark.long
def test_its_report_holds_the_same_and_runs_no_script(done):
    page = (done[0] / "whole" / "report.html").read_text()
    table = pd.read_parquet(done[0] / "whole" / "results.parquet")
    mean = table[(table["measure"] == "area") & (table["method"] == "gradient-norm")][
        "value"
    ].mean()
    assert f"{mean:.4f}" in page
    assert "<script" not in page
    assert page.count("data:image/png;base64,") == 2
    assert "path, path_points 2, mask_batches 2" in page


@pytest.mark.long
def test_a_finished_study_runs_nothing_and_more_entries_run_only_what_is_new(done, tiny, tmp_path):
    place, _ = done
    before = {path: path.stat().st_mtime_ns for path in (place / "whole" / "cells").rglob("*")}
    wider = study_file(tmp_path, tiny, seed=[0, 1], method=METHODS, budget=[0.2, 0.5, 1.0])
    assert run(place, wider, "whole").wait() == 0
    after = {path: path.stat().st_mtime_ns for path in (place / "whole" / "cells").rglob("*")}
    assert {path: after[path] for path in before} == before
    new = {path.name for path in after if path not in before and path.parent.name == "cells"}
    assert len(new) == 4
    assert all(name.startswith("training-") for name in new)


@pytest.mark.long
def test_a_study_that_is_killed_ends_as_one_that_was_not(done):
    place, path = done
    for num_cells in (1, 5):  # at work on more than these
        process = run(place, path, "broken")
        while process.poll() is None and len(recorded(place / "broken")) < num_cells:
            time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert run(place, path, "broken").wait() == 0
    whole, broken = (finished(place / name, plan_of(path)) for name in ("whole", "broken"))
    assert differences(whole, broken) == []


def recorded(root):
    return list(root.glob("cells/*/cell.json"))


def finished(root, cells):
    """Path -> what the cells hold, without logs and where the study is."""
    return {
        f"{cell.name}/{path}": str(held).replace(f"{root.name}/cells", "cells")
        for cell in cells
        for path, held in contents(root / "cells" / cell.name).items()
        if path != "log.txt"
    }


@pytest.mark.long
def test_a_cell_that_fails_is_recorded_and_the_rest_goes_on(tiny, tmp_path):
    data = [str(tiny / "data.jsonl"), str(tmp_path / "absent.jsonl")]
    path = study_file(tmp_path, tiny, data=data, budget=[0.3])
    output = tmp_path / "out"
    assert run(tmp_path, path, "out").wait() == 1
    log = (tmp_path / "out.log").read_text()
    assert "4 of 8 cells finished" in log
    assert "every cell must finish, but 4 of 8 did not" in log
    table = pd.read_csv(output / "results.csv")
    lost = table[table["data"] == "absent.jsonl"]
    assert sorted(lost["status"]) == ["failed", "skipped", "skipped", "skipped"]
    assert lost[lost["status"] == "failed"]["error"].str.contains("absent.jsonl").all()
    assert set(table[table["data"] == "data.jsonl"]["status"]) == {"finished"}
    assert secrets_in(tmp_path) == []
    (tmp_path / "absent.jsonl").write_bytes((tiny / "data.jsonl").read_bytes())
    assert run(tmp_path, path, "out").wait() == 0  # tried again


def test_a_worker_that_dies_takes_one_cell_with_it(tmp_path):
    from keylayers.commands.study.plan import Cell
    from keylayers.commands.study.workers import LocalWorkers

    workers = LocalWorkers(_dying_or_not, 1)
    dying = Cell("ranking", "a", (("--die",),), (), ())
    try:
        workers.begin(tmp_path, dying)
        while not (states := workers.finished(1.0)):
            pass
        assert states[dying.name].status == "failed"
        assert "its process died" in states[dying.name].error
        assert workers.has_room()
        refused = Cell("ranking", "b", (("rank", "--seed", "0"),), (), ())
        workers.begin(tmp_path, refused)
        while not (states := workers.finished(1.0)):
            pass
        assert "--model requires an argument" in states[refused.name].error
        (pool,) = workers._pools.values()
        (idle,) = pool._processes.values()
        idle.kill()
        idle.join()
        (tmp_path / "cells" / "ranking-c").write_text("in the way")
        cannot = Cell("ranking", "c", (("rank",),), (), ())
        workers.begin(tmp_path, cannot)
        while not (states := workers.finished(1.0)):
            pass
        assert states[cannot.name].status == "failed"
        assert "File exists" in states[cannot.name].error
    finally:
        workers.close()


def test_each_local_worker_has_one_accelerator(tmp_path, monkeypatch):
    """By its name, which is set before anything of keylayers imports torch."""
    code = "import sys, keylayers.commands.study.workers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    from keylayers.commands.study.plan import Cell
    from keylayers.commands.study.workers import LocalWorkers, local_devices

    workers = LocalWorkers(visible_device, 3, ["4", "GPU-7"])
    cells = [Cell("ranking", name, (("rank",),), (), ()) for name in "abc"]
    try:
        for cell in cells:
            workers.begin(tmp_path, cell)
        states = {}
        while len(states) < len(cells):
            states |= workers.finished(1.0)
    finally:
        workers.close()
    assert [states[cell.name].error for cell in cells] == ["4", "GPU-7", "4"]
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 2)
    assert local_devices() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    assert local_devices() == ["4", "GPU-7"]


def visible_device(_words):
    """A command that fails with the accelerator it sees."""
    sys.stdout.write(f"keylayers: {os.environ['CUDA_VISIBLE_DEVICES']}\n")
    return 2


def test_what_a_cell_had_finished_is_kept_when_its_worker_dies(tmp_path):
    from keylayers.commands.study.cell import CellState, failed, run_cell, save_state
    from keylayers.commands.study.plan import Cell

    cell = Cell("ranking", "a", (("rank",), ("verify",)), (), ())
    save_state(tmp_path, cell, CellState("running", "", 5.0, 1))
    assert failed(tmp_path, cell, "died") == CellState("failed", "died", 5.0, 1)
    ran = []
    assert run_cell(tmp_path, cell, lambda words: ran.append(words[0]) or 0).status == "finished"
    assert ran == ["verify"]


def test_a_finished_cell_without_its_results_is_to_be_done(tmp_path):
    from keylayers.commands.study.cell import CellState, folder_of, save_state, state_of
    from keylayers.commands.study.plan import Cell

    cell = Cell("ranking", "a", (("rank",),), (), ())
    save_state(tmp_path, cell, CellState("finished", "", 5.0, 1))
    assert state_of(tmp_path, cell) == CellState()
    (folder_of(tmp_path, cell) / "ranking.json").write_text("{}")
    assert state_of(tmp_path, cell).status == "finished"


def test_a_cell_that_ends_python_fails_alone(tmp_path):
    from keylayers.commands.study.cell import run_cell
    from keylayers.commands.study.plan import Cell

    state = run_cell(tmp_path, Cell("ranking", "a", (("rank",),), (), ()), lambda _: sys.exit(0))
    assert state.status == "failed"
    assert state.error.startswith("SystemExit")


def _dying_or_not(words):
    """Keylayers' own commands, and one that ends its process as a lack of memory does."""
    from keylayers.cli import main

    if words[0] == "--die":
        os.kill(os.getpid(), signal.SIGKILL)
    return main(words)


def test_one_study_at_a_time_has_a_folder(tiny, tmp_path, capsys):
    from keylayers.files import one_at_a_time

    path = study_file(tmp_path, tiny, seed=[0])
    with one_at_a_time(tmp_path / "out"):
        assert keylayers("study", path, "--output", tmp_path / "out") == 2
    assert "one run at a time must write to" in capsys.readouterr().err


@pytest.mark.long
def test_ray_gives_the_same_listens_to_nobody_else_and_leaves_nothing_behind(done, tiny):
    place, _ = done
    path = study_file(place / "more", tiny, seed=[0], method=METHODS[:1], budget=[0.2])
    process = run(place, path, "on-ray", "--ray-address", "local")
    try:
        seen, addresses = watched(process, lambda: (place / "on-ray" / "cells").exists())
        maker = next(one for one in seen if "keylayers.commands.study.cluster" in one.cmdline())
        folder = Path(maker.cmdline()[-1])
        token = next(one for one, name in seen.items() if name == "raylet").environ()[
            "RAY_AUTH_TOKEN"
        ]
        assert list(folder.rglob("*.log"))
        assert holding((SECRET, token), folder) == []
    finally:
        process.kill()
        process.wait()
    assert {"gcs_server", "raylet"} <= set(seen.values())
    assert addresses
    assert [one for one in addresses if not is_loopback(one)] == []
    deadline = time.monotonic() + 30
    while any(is_alive(one) for one in seen) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [name for one, name in seen.items() if is_alive(one)] == []
    assert not folder.exists()
    assert run(place, path, "on-ray", "--ray-address", "local").wait() == 0
    whole, on_ray = (finished(place / name, plan_of(path)) for name in ("whole", "on-ray"))
    assert differences(whole, on_ray) == []


@pytest.mark.long
def test_no_key_or_token_is_in_anything_that_a_study_writes(done):
    names = {path.name for path in everything_below(done[0])}
    assert {"cell.json", "log.txt", "study.json", "results.csv", "report.html"} <= names
    assert secrets_in(done[0]) == []
    assert SECRET not in pd.read_parquet(done[0] / "whole" / "results.parquet").to_csv()


def secrets_in(folder):
    return holding((SECRET,), folder)


def holding(texts, folder):
    found = []
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # of a run that is at work
            held = path.read_bytes() if path.is_file() else b""
            if any(text.encode() in held for text in texts):
                found.append(path)
    return found


def watched(process, is_enough):
    """The processes below one with their names, and where all listen, until it is enough."""
    seen, addresses = {}, set()
    while process.poll() is None:
        time.sleep(0.5)
        for one in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                seen[one] = one.name()
        for one in (psutil.Process(process.pid), *seen):
            with contextlib.suppress(psutil.Error):
                ports = one.net_connections(kind="inet")
                addresses |= {port.laddr.ip for port in ports if port.status == psutil.CONN_LISTEN}
        if addresses and is_enough():
            break
    return seen, addresses


def is_loopback(text):
    address = ipaddress.ip_address(text.partition("%")[0])
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def is_alive(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


# An address -> what is said of it.
NO_CLUSTER = [
    ("127.0.0.1:1", "does not answer: Connection refused"),
    ("ray://127.0.0.1:1", "does not answer: Connection refused"),
    ("nonsense", "must be local, auto, HOST:PORT or ray://HOST:PORT"),
    ("ray://somebody:hunter2@127.0.0.1:10001", "without a user or a password"),
]


@pytest.mark.parametrize(("address", "message"), NO_CLUSTER)
def test_a_ray_that_does_not_answer_is_one_line_and_soon(address, message, socket_enabled):
    from keylayers.commands.study.cluster import Cluster
    from keylayers.errors import ConfigError

    start = time.perf_counter()
    with pytest.raises(ConfigError, match=re.escape(message)) as told:
        Cluster(address)
    assert "hunter2" not in str(told.value)
    assert time.perf_counter() - start < 10
