# SPDX-License-Identifier: Apache-2.0
"""Records what the keylayers in ./src computes: `record.py OUTPUT_DIR [PATTERN ...]`.

One JSON file for each case whose name matches a pattern; cases that have a file are skipped.
"""

import json
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

from cases import make_cases
from running import Runner

OUTPUT = Path(sys.argv[1]).resolve()
PATTERNS = sys.argv[2:] or ["*"]


def record() -> None:
    """Record every case that matches and has no file yet."""
    import keylayers

    assert str(keylayers.__file__).startswith(str(Path.cwd() / "src")), keylayers.__file__
    runner = Runner(OUTPUT / "work")
    cases = make_cases(runner)
    names = [name for name in cases if any(fnmatch(name, pattern) for pattern in PATTERNS)]
    begin = time.monotonic()
    for index, name in enumerate(names, 1):
        file = OUTPUT / f"{name}.json"
        if file.exists():
            continue
        try:
            content = cases[name]()
        except Exception as error:
            content = {"exit": type(error).__name__, "log": runner.plain(str(error))}
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=1))
        temporary.replace(file)
        seconds = time.monotonic() - begin
        print(f"{index}/{len(names)} {name}: exit {content['exit']}, {seconds:.0f} s", flush=True)


record()
