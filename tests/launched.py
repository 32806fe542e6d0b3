# SPDX-License-Identifier: Apache-2.0
"""Runs several commands in the processes that a launcher started: the words are a file's lines.

    torchrun --nproc-per-node 2 launched.py COMMANDS.json

Each command is a list of words. Every process prints the exit codes as one line of JSON. With
STOP_AT each training is stopped after that step, as by Ctrl-C.

On a CPU accelerate leaves FSDP and DeepSpeed out. What it would say of two accelerators is said
here in its place; everything else is their own code, and that of keylayers is the same on both.
"""

import json
import os
import sys
import warnings
from pathlib import Path


def spread_by_fsdp():
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def init(self, *arguments, fsdp_plugin=None, **named):
        begin(self, *arguments, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = init


def spread_by_deepspeed():
    from accelerate.state import PartialState

    import keylayers.training.run

    begin = PartialState.__init__

    def init(self, *arguments, **named):
        begin(self, *arguments, **named)
        self.num_processes, self.process_index, self.local_process_index = (
            int(os.environ[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")
        )

    PartialState.__init__ = init
    settings = keylayers.training.run._settings
    # `use_cpu` turns DeepSpeed off without a word
    keylayers.training.run._settings = lambda *given: settings(*given) | {"use_cpu": False}


def stop_at(step):
    from keylayers.training.checkpoints import Checkpoints

    on_step_end = Checkpoints.on_step_end

    def stop(self, args, state, control, **named):
        if state.global_step == step:
            raise KeyboardInterrupt
        on_step_end(self, args, state, control, **named)

    Checkpoints.on_step_end = stop


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    if "ACCELERATE_USE_FSDP" in os.environ:
        spread_by_fsdp()
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        spread_by_deepspeed()
    if "STOP_AT" in os.environ:
        stop_at(int(os.environ["STOP_AT"]))
    from keylayers.cli import main

    codes = [main(words) for words in json.loads(Path(sys.argv[1]).read_text())]
    sys.stdout.write(json.dumps({os.environ["RANK"]: codes}) + "\n")
