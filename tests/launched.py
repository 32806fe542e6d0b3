# SPDX-License-Identifier: Apache-2.0
"""Runs several commands in the processes that a launcher started: the words are a file's lines.

    torchrun --nproc-per-node 2 launched.py COMMANDS.json

Each command is a list of words. Every process prints the exit codes as one line of JSON.
"""

import json
import os
import sys
import warnings
from pathlib import Path

from keylayers.cli import main

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    codes = [main(words) for words in json.loads(Path(sys.argv[1]).read_text())]
    sys.stdout.write(json.dumps({os.environ["RANK"]: codes}) + "\n")
