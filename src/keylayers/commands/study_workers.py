# SPDX-License-Identifier: Apache-2.0
"""Run the cells of a study side by side, in processes of this machine or on a Ray cluster."""

import contextlib
import json
import multiprocessing
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from graphlib import TopologicalSorter
from urllib.parse import urlsplit

from keylayers.commands.study_cells import Cell
from keylayers.commands.study_grid import printable
from keylayers.errors import ConfigError, KeylayersError, OutputError
from keylayers.files import WHAT_TO_DO, says_full, write_json

HEAVY = ["torch", "transformers", "trl", "peft", "datasets"]  # what the commands import
CONNECT_SECONDS = 10.0


@dataclass(frozen=True)
class State:
    """How a cell ended: `finished`, or `failed` or `skipped` for now; else `waiting`."""

    status: str = "waiting"
    error: str = ""
    seconds: float = 0.0


Submit = Callable[[Cell], "Future[State]"]


def state_of(cell: Cell) -> State:
    """How the last run of a cell ended; waiting if its results are gone."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        text = (cell.folder / "cell.json").read_text(encoding="utf-8")
        state = State(**json.loads(text)["state"])
        if state.status == "failed" or cell.result.is_file():
            return state
    return State()


def run_cells(cells: Sequence[Cell], submit: Submit) -> dict[str, State]:
    """Run every cell that is not finished, after the cells that it needs; how each ended."""
    by_name = {cell.name: cell for cell in cells}
    states = {cell.name: state_of(cell) for cell in cells}
    order = TopologicalSorter({cell.name: cell.needs for cell in cells})
    order.prepare()
    running: dict[Future[State], str] = {}
    while order.is_active():
        for name in order.get_ready():
            lost = [need for need in by_name[name].needs if states[need].status != "finished"]
            if lost:
                states[name] = State("skipped", f"needs {lost[0]}, which failed")
            if lost or states[name].status == "finished":
                order.done(name)
            else:
                running[submit(by_name[name])] = name
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            name = running.pop(future)
            try:
                state = future.result()
            except Exception as error:  # of its worker or its folder: the other cells go on
                state = State("failed", " ".join(str(error).split())[:500])
            if says_full(state.error):  # every other cell would fail, too
                where = str(by_name[name].folder)
                raise OutputError(f"the disk must have room for {where!r}, {WHAT_TO_DO}")
            states[name] = state
            why = f": {state.error}" if state.error else f" after {state.seconds:.0f} s"
            sys.stderr.write(printable(f"{name} {state.status}{why}") + "\n")
            order.done(name)
    return states


def run_cell(cell: Cell) -> State:
    """Run the command of a cell in this process, with its output in log.txt, and record the end."""
    from keylayers.cli import main

    cell.folder.mkdir(parents=True, exist_ok=True)
    start, error = time.perf_counter(), ""
    with (
        (cell.folder / "log.txt").open("w", encoding="utf-8", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        try:
            if code := main([*cell.words, "--traceback"]):
                error = f"exit code {code}"
        except (Exception, SystemExit) as raised:  # recorded; the other cells go on
            traceback.print_exc()
            name = "" if isinstance(raised, KeylayersError) else f"{type(raised).__name__}: "
            error = name + " ".join(str(raised).split())
    state = State("failed" if error else "finished", error, time.perf_counter() - start)
    write_json(cell.folder / "cell.json", {"command": list(cell.words), "state": asdict(state)})
    return state


@contextlib.contextmanager
def local(count: int | None) -> Iterator[Submit]:
    """Run `count` cells at a time: by default one per accelerator, or else per core."""
    import torch

    num_devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_devices)))
    devices: list[str | None] = [*names.split(",")[:num_devices]] or [None]
    count = count or num_devices or len(os.sched_getaffinity(0))
    free: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    for index in range(count):
        free.put(devices[index % len(devices)])
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers share the cores
    # A fork of a process that has imported torch starts at once. With accelerators, torch may only
    # be imported after CUDA_VISIBLE_DEVICES is set: peft imports bitsandbytes, which starts CUDA.
    context = multiprocessing.get_context("spawn" if num_devices else "forkserver")
    multiprocessing.set_forkserver_preload(HEAVY)

    def run(cell: Cell) -> State:
        device = free.get()
        try:
            with ProcessPoolExecutor(1, context, _prepare, (device,)) as process:
                return process.submit(run_cell, cell).result()
        except BrokenProcessPool as error:
            raise RuntimeError("its process died: out of memory?") from error
        finally:
            free.put(device)

    executor = ThreadPoolExecutor(count)
    try:
        yield lambda cell: executor.submit(run, cell)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():  # their cells go on in the next run
            process.kill()


def _prepare(device: str | None) -> None:
    """Begin a process that runs one cell and ends when the study is killed."""
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if "torch" in sys.modules:
        # A fork inherits torch's thread pool without its threads. The first use replaces the pool,
        # but not safely from several threads at once, as transformers 5 loads weights ("Invalid
        # thread pool!", torch 2.13): so the first use is here.
        sys.modules["torch"].set_num_threads(sys.modules["torch"].get_num_threads())


def _exit_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()
    os._exit(1)


@contextlib.contextmanager
def on_ray(address: str) -> Iterator[Submit]:
    """Run cells on a Ray cluster whose machines see the same files, one GPU each if it has any."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("`ray_address` needs Ray: `pip install 'keylayers[study]'`") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        if address != "auto":  # Ray would wait for minutes for an answer and end the process
            parts = urlsplit(address if "://" in address else f"ray://{address}")
            if parts.port is None:
                raise ValueError("it has no port")
            socket.create_connection((parts.hostname, parts.port), CONNECT_SECONDS).close()
        ray.init(address=address, logging_level="error", log_to_driver=False)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"`ray_address` must be auto, HOST:PORT or ray://HOST:PORT of a running cluster, got "
            f"{address!r}: {error}"
        ) from error
    gpus = int("GPU" in ray.cluster_resources())
    # A process that used a GPU cannot move to another one, so it ends after one cell.
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, max_calls=gpus)(_ray_task)
    try:
        yield lambda cell: task.remote(os.getcwd(), cell).future()
    finally:
        ray.shutdown()


def _ray_task(folder: str, cell: Cell) -> State:
    os.chdir(folder)
    return run_cell(cell)
