# SPDX-License-Identifier: Apache-2.0
"""Run every benchmark and write its record: `python -m benchmarks --output FOLDER`."""

import argparse
from pathlib import Path

from benchmarks import mask_step
from keylayers.records import environment, write_json


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("out/bench"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    result = mask_step.run()
    write_json(arguments.output / "mask_step.json", {"environment": environment(), **result})
    print(f"records in {arguments.output}")


if __name__ == "__main__":
    main()
