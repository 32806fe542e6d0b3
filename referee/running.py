# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: D102
"""Runs commands in forked processes and turns the files that they write into comparable values."""

import hashlib
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

SHARED = Path(__file__).resolve().parents[2] / "shared"
TIMEOUT_SECONDS = 240
# Differs from run to run, or with the folder: how long, with what software, hashes of the above.
DROPPED = {"environment", "seconds", "ranking_sha256"}
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w])")
VOLATILE = re.compile(r"keylayers \d\S*|, \d+ s\b|\b\d+ s\b|[0-9a-f]{12,}|\d+\.\d+\.\d+")


def forked(function: Callable[[], Any], log: Path) -> Any:
    """What `function` returns (as JSON) in a process of its own; its output goes to `log`."""
    answer = log.with_suffix(".answer")
    answer.unlink(missing_ok=True)
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        signal.alarm(TIMEOUT_SECONDS)
        torch.set_num_threads(
            1
        )  # renews torch's pool of threads, before several threads ask for it
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(
                os.open(log.with_suffix(f".{name}"), os.O_RDWR | os.O_CREAT | os.O_TRUNC), number
            )
        try:
            result = json.dumps(function())
            answer.write_text(result)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    os.waitpid(process, 0)
    return json.loads(answer.read_text()) if answer.exists() else "crashed"


class Runner:
    """Commands in one work folder."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.made: set[str] = set()
        (work / "logs").mkdir(parents=True, exist_ok=True)
        self.count = 0

    def run(self, *arguments: object) -> dict[str, Any]:
        """Exit code, `out` and `err` of a command."""
        from keylayers.cli import main

        self.count += 1
        log = self.work / "logs" / f"{os.getpid()}-{self.count}"
        code = forked(lambda: main(last_of_each(arguments)), log)
        out, err = (log.with_suffix(f".{name}").read_text() for name in ("out", "err"))
        return {"exit": code, "out": out, "log": "" if code == 0 else self.plain(err[-1500:])}

    def folder(self, name: str, *arguments: object) -> Path:
        """A folder that a command writes, once."""
        output = self.work / name
        marker = self.work / "logs" / f"{name}.done"
        if not marker.exists():
            ran = self.run(*arguments, "--output", output)
            assert ran["exit"] == 0, ran
            marker.touch()
        return output

    def plain(self, value: Any) -> Any:
        """`value` without what differs from run to run."""
        if isinstance(value, dict):
            return {key: self.plain(one) for key, one in value.items() if key not in DROPPED}
        if isinstance(value, list | tuple):
            return [self.plain(one) for one in value]
        if isinstance(value, str):
            value = value.replace(str(self.work), "WORK").replace(str(SHARED), "SHARED")
            return value.replace(str(SHARED.resolve()), "SHARED")
        return value

    def read(self, folder: Path) -> dict[str, Any]:
        """Everything in `folder`, by the names of its files."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return {str(path.relative_to(folder)): self.read_file(path) for path in files}

    def read_file(self, path: Path) -> Any:
        if path.suffix == ".safetensors":
            return tensors(path)
        if path.name in ("tokenizer.json", "model.safetensors.index.json"):
            return hashlib.sha256(path.read_bytes()).hexdigest()
        if path.name == "README.md":
            return numbers(path.read_text())
        if path.name == "adapter_config.json":
            content = json.loads(path.read_text())
            for key, value in content.items():  # sets of PEFT, in no order
                if isinstance(value, list):
                    content[key] = sorted(value, key=str)
            return self.plain(content)
        if path.suffix == ".json":
            return self.plain(json.loads(path.read_text()))
        try:
            return self.plain(path.read_text())
        except UnicodeDecodeError:
            return "binary"


def last_of_each(arguments: Iterable[object]) -> list[str]:
    """The arguments as texts; of an option that is given several times, the last."""
    groups: dict[str, list[str]] = {"": []}
    name = ""
    for argument in map(str, arguments):
        if argument.startswith("--"):
            name = argument
            groups.pop(name, None)
        groups.setdefault(name, []).append(argument)
    return [argument for group in groups.values() for argument in group]


def numbers(text: str) -> list[str]:
    """The numbers in a text, but not versions, hashes and seconds."""
    return NUMBER.findall(VOLATILE.sub(" ", text))


def tensors(path: Path) -> dict[str, str]:
    """The hash of each tensor in a safetensors file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            hashed = hashlib.sha256(data[start + first : start + last]).hexdigest()
            found[name] = f"{entry['dtype']} {entry['shape']} {hashed}"
    return found
