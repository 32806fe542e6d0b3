# SPDX-License-Identifier: Apache-2.0
"""A stand-in for `python` in tests: it starts at once, with torch and the like imported already.

`python()` is the path of an executable that takes the arguments of Python: `-c CODE`, `-m MODULE`
or a script. A server, started once per test session, imports the libraries and forks for each call.
The executable hands over its standard streams, folder, environment and signals, and ends as the
fork ends. When it is killed, so is the fork.

Real Python runs instead where a fork would differ: with other options than -W, -u and -B, and with
an environment that the libraries read while they are imported (`READ_AT_IMPORT`).
"""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

VARIABLE = "PRELOADED_PYTHON"  # where the executable is, for the workers of xdist
READ_AT_IMPORT = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "DATASETS_", "CUDA_", "PYTHONHASHSEED")
IMPORTED = (
    *("torch", "torch._dynamo", "transformers", "peft", "trl", "datasets", "accelerate"),
    *("safetensors.torch", "pandas", "pyarrow.parquet", "scipy.stats", "yaml", "rich.console"),
    *("transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto"),
    *("trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "cyclopts", "beartype"),
    *("torch.distributed.run", "torch.utils.tensorboard"),
)
# What `keylayers` sets before it imports them, and lm_eval when it is imported
SET_BY_LIBRARIES = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TQDM_DISABLE": "1",
    "HF_XET_HIGH_PERFORMANCE": "1",
}
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
LAUNCHER = '#!/bin/sh\nexec "{python}" -IS "{script}" "{address}" "$@"\n'


def python():
    """Path of the executable; the first call of a session starts the server."""
    if VARIABLE not in os.environ:
        place = "/tmp" if os.path.isdir("/tmp") else None  # the path of a socket must be short
        folder = Path(tempfile.mkdtemp(prefix="preloaded-", dir=place))
        launcher, address = folder / "python", folder / "socket"
        launcher.write_text(
            LAUNCHER.format(python=sys.executable, script=Path(__file__), address=address)
        )
        launcher.chmod(0o755)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(address))
        listener.listen(64)  # calls wait here until the imports are done
        with (folder / "log.txt").open("w") as log:
            server = subprocess.Popen(  # ends when this process ends, for it reads from it
                [sys.executable, __file__, "serve", str(listener.fileno()), str(folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={**os.environ, **SET_BY_LIBRARIES, "PYTHONPATH": ""},
                pass_fds=[listener.fileno()],
                start_new_session=True,
            )
        listener.close()
        atexit.register(server.communicate)  # ends its input, and so the server
        os.environ[VARIABLE] = str(launcher)
    return os.environ[VARIABLE]


# --- the executable: python -IS preloaded.py ADDRESS ARGUMENTS...


def call(address, arguments):
    """Have the server run a fork with these arguments, and end as it ends."""
    real = [sys.executable, *arguments]
    connection = socket.socket(socket.AF_UNIX)
    request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
    try:
        connection.connect(address)
    except OSError:
        os.execv(real[0], real)
    socket.send_fds(connection, [b" "], [0, 1, 2])
    connection.sendall(json.dumps(request).encode() + b"\n")
    told = connection.makefile()
    process = int(told.readline() or 0)
    if not process:
        os.execv(real[0], real)

    def forward(number, _):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)

    for number in FORWARDED:
        signal.signal(number, forward)
    code = int(told.readline() or -signal.SIGKILL)
    if code < 0:
        _end_by(-code)
    os._exit(code)


def _end_by(number):
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    signal.pause()


# --- the server: python preloaded.py serve LISTENER FOLDER


def serve(listener, folder):
    """Answer every call by a fork, until standard input ends."""
    import gc
    import importlib
    import shutil
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in IMPORTED:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    listener = socket.socket(fileno=listener)
    while 0 not in select.select([0, listener], [], [])[0]:
        connection, _ = listener.accept()
        if not os.fork():
            listener.close()
            with contextlib.suppress(OSError, ValueError):  # the caller was killed
                _keep(connection)
            os._exit(0)
        connection.close()
    shutil.rmtree(folder, ignore_errors=True)


def _keep(connection):
    """Fork for a call, say how the fork ends, and kill it when its caller or the session ends."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    request = json.loads(connection.makefile().readline())
    if not _fork_would_do(request):
        connection.sendall(b"0\n")
        return
    ends, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    process = os.fork()
    if not process:
        for file in (connection.detach(), ends, wakes):
            os.close(file)
        _become(request, streams)
    with contextlib.suppress(OSError):  # the caller was killed, as `select` will see
        connection.sendall(f"{process}\n".encode())
    ready, _, _ = select.select([0, connection, ends], [], [])
    if ends not in ready:
        (os.killpg if 0 in ready else os.kill)(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _fork_would_do(request):
    given = {name for name, _ in request["environment"].items() - os.environ.items()}
    is_read = any(name.startswith(READ_AT_IMPORT) for name in given)
    return not is_read and _parsed(request["arguments"]) is not None


def _parsed(arguments):
    """Filters of warnings, whether output is unbuffered, and the rest; None for other options."""
    filters, options, rest = [], [], list(arguments)
    while rest and rest[0] in ("-W", "-u", "-B"):
        options.append(rest.pop(0))
        if options[-1] == "-W":
            filters.append(rest.pop(0))
    is_known = bool(rest) and (rest[0] in ("-c", "-m") or not rest[0].startswith("-"))
    return (filters, "-u" in options, rest) if is_known else None


def _become(request, streams):
    """Be the process that was asked for; does not return."""
    import atexit
    import threading

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
    for stream in streams:
        if stream > 2:
            os.close(stream)
    code = 0
    try:
        _run(request)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        if code < 0:
            _end_by(-code)
        os._exit(code & 0xFF)


def _run(request):
    import random
    import runpy
    import types
    import warnings

    filters, is_unbuffered, (first, *rest) = _parsed(request["arguments"])
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
    sys.stdout.reconfigure(write_through=is_unbuffered, line_buffering=os.isatty(1))
    sys.stderr.reconfigure(line_buffering=True)
    random.seed()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    sys.modules["torch"].set_num_threads(int(threads) if threads.isdigit() else os.cpu_count())
    warnings.resetwarnings()
    kinds = ("Resource", "Import", "PendingDeprecation", "Deprecation")
    usual = [*(f"ignore::{kind}Warning" for kind in kinds), "default::DeprecationWarning:__main__"]
    given = filter(None, os.environ.get("PYTHONWARNINGS", "").split(","))
    warnings._processoptions([*usual, *given, *filters])
    path = [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    sys.path[:] = [*path, *sys.path[1:]]  # the first was that of this file
    if first == "-c":
        sys.argv, sys.path[:0] = ["-c", *rest[1:]], [""]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv, sys.path[:0] = rest, [request["folder"]]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[:0] = [first, *rest], [str(Path(first).resolve().parent)]
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]), sys.argv[3])
    else:
        call(sys.argv[1], sys.argv[2:])
