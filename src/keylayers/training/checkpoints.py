# SPDX-License-Identifier: Apache-2.0
"""Checkpoints from which a stopped training resumes, with the same bits as without the stop.

The trainer writes and reads them; this file decides when, and which of them are whole.
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from keylayers.environment import is_first_process
from keylayers.files import RECORD, write_json
from keylayers.processes import from_first, wait_for_all

FIRST_SECONDS = 60.0
LARGEST_SHARE = 0.05  # of the run's time may be spent on saving
NUM_CHECKPOINTS = 2  # the previous is whole while the next is written


class Checkpoints(TrainerCallback):
    """Saves a training at intervals, and finds the `last` whole checkpoint of an earlier run.

    A checkpoint counts only if it holds keylayers.json, which is written last, and belongs to a
    training of the same inputs; all others are removed.
    """

    def __init__(self, folder: Path, inputs_sha256: str, save_steps: int | None = None) -> None:
        """Find the last checkpoint in `folder`, which is for one training alone.

        `save_steps` lie between checkpoints, 0 for none. By default time decides.
        """
        self.folder = folder
        self.inputs_sha256 = inputs_sha256
        self.save_steps = save_steps
        self.last: Path | None = None
        self.last_step = 0
        self._seconds_before = 0.0
        self._saving_seconds = 0.0
        self._start = self._saved_at = time.perf_counter()
        for found in folder.iterdir() if folder.is_dir() else ():
            step, record = found.name.removeprefix("checkpoint-"), _record(found)
            if not step.isdecimal() or record.get("inputs_sha256") != inputs_sha256:
                if is_first_process():
                    shutil.rmtree(found, ignore_errors=True)
            elif int(step) > self.last_step:
                self.last, self.last_step = found, int(step)
                self._seconds_before = float(record["seconds"])

    @property
    def seconds(self) -> float:
        """Wall time of the training so far, including the stopped run up to `last`."""
        return self._seconds_before + time.perf_counter() - self._start

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        """Start the clock."""
        self._start = self._saved_at = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        """Ask the trainer to save when it is time, but not after the last step."""
        if state.global_step < state.max_steps and from_first(self._is_due(state.global_step)):
            control.should_save = True
            self._asked_at = time.perf_counter()

    def _is_due(self, step: int) -> bool:
        if self.save_steps is not None:
            return self.save_steps > 0 and step % self.save_steps == 0
        wait = max(FIRST_SECONDS, self._saving_seconds / LARGEST_SHARE)
        return time.perf_counter() - self._saved_at > wait

    def on_save(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        """Mark the checkpoint as whole: the trainer has written everything."""
        folder = self.folder / f"checkpoint-{state.global_step}"
        wait_for_all()  # until each process has written its random state
        if state.is_world_process_zero:
            for path in filter(Path.is_file, folder.rglob("*")):
                with path.open("rb") as file:  # on the disk before the mark, in case of a power cut
                    os.fsync(file.fileno())
        write_json(folder / RECORD, {"inputs_sha256": self.inputs_sha256, "seconds": self.seconds})
        self._saved_at = time.perf_counter()
        self._saving_seconds = self._saved_at - self._asked_at


def _record(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
