# SPDX-License-Identifier: Apache-2.0
"""Where cells are run: processes on this machine, or a Ray cluster, with the same results.

Each worker is a process of its own that runs one cell after another, so that one that dies takes
one cell with it.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from keylayers.commands.study.cell import CellState, RunCommand, failed, run_cell
from keylayers.commands.study.cluster import Cluster
from keylayers.commands.study.plan import Cell


@runtime_checkable
class Workers(Protocol):
    """Run cells side by side."""

    def has_room(self) -> bool:
        """Whether another cell would be begun at once."""
        ...

    def begin(self, root: Path, cell: Cell) -> None:
        """Run a cell."""
        ...

    def finished(self, timeout_seconds: float) -> dict[str, CellState]:
        """Cell name -> state of those that have ended since it was asked last."""
        ...

    def close(self) -> None:
        """Stop, with what is running."""
        ...


class LocalWorkers:
    """Processes on this machine, which end with the process that made them."""

    def __init__(
        self, run_command: RunCommand, num_workers: int, devices: Sequence[str] = ()
    ) -> None:
        """Start nothing yet.

        Args:
            run_command: As `run_cell` takes it; a function that other processes can import.
            num_workers: How many cells run at once.
            devices: Names of accelerators, which the workers take in turn.
        """
        self._run_command = run_command
        self._devices = tuple(devices)
        self._idle = list(range(num_workers))[::-1]
        self._pools: dict[int, ProcessPoolExecutor] = {}
        self._running: dict[Future[CellState], tuple[Path, Cell, int]] = {}

    def has_room(self) -> bool:
        """Whether a worker is idle."""
        return bool(self._idle)

    def begin(self, root: Path, cell: Cell) -> None:
        """Give a cell to an idle worker, which is started if it is not there yet."""
        slot = self._idle.pop()
        if slot in self._pools and _has_died(self._pools[slot]):
            self._pools.pop(slot).shutdown(wait=False)
        if slot not in self._pools:
            self._pools[slot] = self._new_pool(slot)
        future = self._pools[slot].submit(run_cell, root, cell, self._run_command)
        self._running[future] = (root, cell, slot)

    def finished(self, timeout_seconds: float) -> dict[str, CellState]:
        """Wait for a cell to end, or for the time to pass."""
        done, _ = wait(self._running, timeout_seconds, return_when=FIRST_COMPLETED)
        states = {}
        for future in done:
            root, cell, slot = self._running.pop(future)
            self._idle.append(slot)
            try:
                states[cell.name] = future.result()
            except BrokenProcessPool:
                self._pools.pop(slot).shutdown(wait=False)
                reason = "its process died, as it does when memory runs out or somebody kills it"
                states[cell.name] = failed(root, cell, reason)
            except OSError as error:  # its folder cannot be made or written
                states[cell.name] = failed(root, cell, str(error))
        return states

    def close(self) -> None:
        """Kill the workers that are at work; their cells go on in the next run."""
        busy = {slot for *_, slot in self._running.values()}
        for slot, pool in self._pools.items():
            if slot in busy:
                for process in list((pool._processes or {}).values()):
                    process.kill()
            pool.shutdown(wait=True, cancel_futures=True)

    def _new_pool(self, slot: int) -> ProcessPoolExecutor:
        device = self._devices[slot % len(self._devices)] if self._devices else None
        return ProcessPoolExecutor(
            1,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_begin_worker,
            initargs=(device,),
        )


class RayWorkers:
    """A Ray cluster that shares the study's folder and the files that its options name."""

    def __init__(self, run_command: RunCommand, address: str) -> None:
        """Connect.

        Args:
            run_command: As `run_cell` takes it; a function that other processes can import.
            address: Of a cluster; `local` starts one on this machine.

        Raises:
            ConfigError: Ray is not installed, or no cluster answers there.
        """
        self._cluster = Cluster(address)
        self._ray: Any = self._cluster.ray
        self._run_command = run_command
        num_devices = int(self._ray.cluster_resources().get("GPU", 0))
        self._num_slots = num_devices or int(self._ray.cluster_resources().get("CPU", 1))
        # A process that has used an accelerator cannot move to another one, so it runs one cell.
        num_calls = 1 if num_devices else 0  # 0: no limit
        self._task = self._ray.remote(
            num_cpus=1, num_gpus=1 if num_devices else 0, max_retries=0, max_calls=num_calls
        )(_run_on_ray)
        self._running: dict[Any, tuple[Path, Cell]] = {}

    def has_room(self) -> bool:
        """Whether the cluster has a core, or an accelerator, for another cell."""
        return len(self._running) < self._num_slots

    def begin(self, root: Path, cell: Cell) -> None:
        """Give the cluster a cell."""
        task = self._task.remote(os.getcwd(), root, cell, self._run_command)
        self._running[task] = (root, cell)

    def finished(self, timeout_seconds: float) -> dict[str, CellState]:
        """Wait for a cell to end, or for the time to pass."""
        done, _ = self._ray.wait(list(self._running), timeout=timeout_seconds)
        states = {}
        for one in done:
            root, cell = self._running.pop(one)
            try:
                states[cell.name] = self._ray.get(one)
            except self._ray.exceptions.RayTaskError as error:
                states[cell.name] = failed(root, cell, str(error.cause))
            except self._ray.exceptions.RayError as error:
                reason = f"its process died: {str(error).splitlines()[0]}"
                states[cell.name] = failed(root, cell, reason)
        return states

    def close(self) -> None:
        """Stop what is running, and leave the cluster."""
        for one in self._running:
            self._ray.cancel(one, force=True)
        self._cluster.close()


def local_devices() -> list[str]:
    """The accelerators that this process may use, by the names that CUDA knows them by."""
    import torch

    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:count] if named else [str(index) for index in range(count)]


def num_local_workers(devices: Sequence[str]) -> int:
    """As many as accelerators, or as cores where there are none."""
    return len(devices) or len(os.sched_getaffinity(0))


def _has_died(pool: ProcessPoolExecutor) -> bool:
    """Whether its process is gone, which the pool itself finds out a moment later."""
    return any(not process.is_alive() for process in (pool._processes or {}).values())


def _run_on_ray(folder: str, root: Path, cell: Cell, run_command: RunCommand) -> CellState:
    os.chdir(folder)
    _one_thread()
    return run_cell(root, cell, run_command)


def _begin_worker(device: str | None) -> None:
    """Make a new process a worker: one thread, one accelerator, and an end with its parent.

    CUDA reads which accelerators it may use once, so nothing may ask torch for them before.
    """
    _one_thread()
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent sees to it
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _one_thread() -> None:
    """Cells share the cores; before torch is imported."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
