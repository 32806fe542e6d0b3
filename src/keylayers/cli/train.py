# SPDX-License-Identifier: Apache-2.0
"""`keylayers train`."""

from pathlib import Path
from typing import Annotated

from cyclopts import App

from keylayers.cli.config import flat
from keylayers.options import (
    LOSS_UNITS,
    DataOptions,
    ModelOptions,
    SelectionOptions,
    TrainingOptions,
    TrainOptions,
)

EXAMPLES = """Examples:

```
keylayers train --ranking out --budget 0.3 --output tuned
keylayers train --ranking out --freeze 0.25 --steps 1000 --data all.jsonl
keylayers train --ranking out --budget 17 --update full --controls all random
```
"""

app = App(help_epilogue=EXAMPLES)


@app.default
def train(
    *,
    selection: Annotated[SelectionOptions, flat("Selection")],
    model: Annotated[ModelOptions, flat("Model")],
    data: Annotated[DataOptions, flat("Data")],
    training: Annotated[TrainingOptions, flat("Fine-tuning")] = TrainingOptions(),
    output: Path = Path("tuned"),
    config: Path | None = None,
) -> None:
    """Train only the modules that a ranking and a budget select.

    Writes an ordinary PEFT adapter, or with --update full a checkpoint in which only the selected
    weights changed. Model, data and training options that are not given are those of the ranking.

    Args:
        output: Folder of the adapter or checkpoint.
        config: YAML file with any of these options; flags win over it.
    """
    from dataclasses import asdict

    from keylayers.cli.console import ConsoleProgress, stdout
    from keylayers.report.terminal import loss_table
    from keylayers.runs.train import train as run

    options = TrainOptions(selection, model, data, training)
    rows = run(options, output, ConsoleProgress())
    console = stdout()
    console.print(loss_table([asdict(row) for row in rows], LOSS_UNITS[training.objective]))
    kind = "adapter" if selection.update == "lora" else "checkpoint"
    console.print(f"\n{kind} written to {output}", markup=False)
