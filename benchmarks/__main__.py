# SPDX-License-Identifier: Apache-2.0
"""Run benchmarks and write their records: `python -m benchmarks [NAME ...]`."""

import argparse
from importlib import import_module
from pathlib import Path

import torch

from keylayers.environment import environment
from keylayers.files import write_json

NAMES = ("mask_step", "free_score", "train_selection", "growth", "start_up", "checkpoint_pair")


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in given.names:
        result = import_module(f"benchmarks.{name}").run()
        write_json(given.output / f"{name}.json", {"environment": environment(), **result})
    print(f"records in {given.output}")


if __name__ == "__main__":
    main()
