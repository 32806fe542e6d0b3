# SPDX-License-Identifier: Apache-2.0
"""Run every benchmark, and write its record beside it: `python -m benchmarks`."""

import argparse
from pathlib import Path

from benchmarks import (
    checkpoint_pair,
    free_score,
    growth,
    long_run,
    mask_step,
    memory_budget,
    start_up,
    train_selection,
)
from keylayers.environment import environment
from keylayers.files import write_json


def main() -> None:
    """Run, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    benchmarks = (
        mask_step,
        free_score,
        train_selection,
        memory_budget,
        growth,
        long_run,
        start_up,
        checkpoint_pair,
    )
    for benchmark in benchmarks:
        name = benchmark.__name__.rpartition(".")[2]
        result = benchmark.run()
        write_json(arguments.output / f"{name}.json", {"environment": environment(), **result})
    print(f"records in {arguments.output}")


if __name__ == "__main__":
    main()
