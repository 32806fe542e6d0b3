# SPDX-License-Identifier: Apache-2.0
"""Run every benchmark and write its record: `python -m benchmarks --output FOLDER`."""

import argparse
from pathlib import Path

from benchmarks import checkpoint_pair, mask_step
from keylayers.records import environment, write_json


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for benchmark in (mask_step, checkpoint_pair):
        name = benchmark.__name__.rpartition(".")[2]
        result = benchmark.run()
        write_json(arguments.output / f"{name}.json", {"environment": environment(), **result})
    print(f"records in {arguments.output}")


if __name__ == "__main__":
    main()
