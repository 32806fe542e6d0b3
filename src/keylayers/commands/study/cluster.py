# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster: one that exists, or one of this machine alone that ends with its maker.

Left to itself, a Ray of this machine binds its ports to every interface, writes a token to the home
folder, and when the process that started it is killed, some of its daemons stay for a while. Run as
a script, this file is the process that sees to the end: it waits until its maker closes its
standard input or dies.
"""

import asyncio
import contextlib
import ipaddress
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from keylayers.errors import ConfigError, GuardError

LOCAL, FOUND = "local", "auto"  # addresses that name no machine
ANSWER_SECONDS = 10.0
OBJECT_STORE_BYTES = 10**8  # cells hand nothing to each other but files
ENVIRONMENT = {
    # The switch by which Ray keeps to 127.0.0.1, made for systems whose firewall asks. Linux has no
    # other: there even `_node_ip_address="127.0.0.1"` becomes an address that others reach.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",  # other users of this machine need the token
}


class Cluster:
    """A connection to Ray.

    Attributes:
        ray: The module, connected.
    """

    def __init__(self, address: str) -> None:
        """Connect.

        Args:
            address: Of a cluster; `auto` finds one, `local` starts one on this machine.

        Raises:
            ConfigError: Ray is not installed, or no cluster answers there.
            GuardError: a Ray of this machine can be reached from elsewhere.
        """
        if find_spec("ray") is None:
            raise ConfigError(
                "`ray_address` needs Ray, which is not installed; `pip install 'keylayers[study]'`"
            )
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._watcher: subprocess.Popen[bytes] | None = None
        if address == LOCAL:
            self.ray = self._started()
        else:
            _check_answers(address)
            self.ray = _connected(address)

    def close(self) -> None:
        """Leave it; what was started here ends, and its files go."""
        self.ray.shutdown()
        if self._watcher is not None:
            assert self._watcher.stdin is not None
            self._watcher.stdin.close()
            self._watcher.wait()

    def _started(self) -> Any:
        os.environ.update(ENVIRONMENT)  # before Ray is imported, which reads it then
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        folder = tempfile.mkdtemp(prefix="keylayers-ray-")  # short: it holds sockets
        self._watcher = subprocess.Popen(
            [sys.executable, "-m", __name__, folder],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C and Ray's own reaper kill by groups
        )
        import ray

        ray.init(
            address=LOCAL,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            logging_level="error",
            log_to_driver=False,
            _temp_dir=folder,
        )
        address = ray.util.get_node_ip_address()
        if not ipaddress.ip_address(address).is_loopback:
            raise GuardError(
                f"a Ray of this machine must listen on the loopback interface alone, but listens "
                f"on {address}; was Ray imported before the study began?"
            )
        return ray


def _connected(address: str) -> Any:
    import ray

    try:
        ray.init(address=address, logging_level="error", log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        raise ConfigError(_no_cluster(address, str(error))) from error
    return ray


def _check_answers(address: str) -> None:
    """Knock at a cluster's door: Ray itself waits for minutes and then ends the process."""
    if address == FOUND:
        return
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port, is_ray = parts.hostname, parts.port, parts.scheme in ("", "ray")
    except ValueError:  # a port that is no number
        host, port, is_ray = None, None, False
    if not (host and port and is_ray) or "@" in parts.netloc:
        raise ConfigError(
            "`ray_address` must be local, auto, HOST:PORT or ray://HOST:PORT, without a user or a "
            "password, and it is something else"
        )

    async def knock() -> None:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, port), ANSWER_SECONDS)
        writer.close()

    try:
        asyncio.run(knock())
    except OSError as error:  # TimeoutError too
        waited = f"nothing within {ANSWER_SECONDS:.0f} seconds"
        reason = os.strerror(error.errno) if error.errno else waited
        raise ConfigError(_no_cluster(address, reason)) from error


def _no_cluster(address: str, reason: str) -> str:
    return (
        f"`ray_address` must be that of a running cluster, or local, but {address!r} does not "
        f"answer: {reason}"
    )


def end_cluster(folder: Path, spared: int) -> None:
    """Kill every process that has a file of the folder open, as all of a cluster do; remove it.

    Args:
        folder: Of the cluster's logs and sockets.
        spared: A process that is not to be killed.
    """
    while found := [one for one in _users(folder) if one.pid != spared]:
        for process in found:
            with contextlib.suppress(psutil.Error):
                process.kill()
        time.sleep(0.1)  # some were being born
    shutil.rmtree(folder, ignore_errors=True)


def _users(folder: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # gone, or somebody else's
            if any(folder in Path(one.path).parents for one in process.open_files()):
                yield process


if __name__ == "__main__":
    sys.stdin.buffer.read()
    end_cluster(Path(sys.argv[1]), os.getppid())
