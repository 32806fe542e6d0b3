# SPDX-License-Identifier: Apache-2.0
"""`keylayers train`."""

from pathlib import Path
from typing import Annotated

from cyclopts import App

from keylayers.commands.config import flat
from keylayers.commands.run_options import TrainOptions
from keylayers.commands.scoring_flags import ScoringFlags
from keylayers.commands.selection import SelectionOptions
from keylayers.data.options import DataOptions
from keylayers.model.options import ModelOptions
from keylayers.training.options import LOSS_UNITS, StabilityOptions, TrainingOptions

EXAMPLES = """Examples:

```
keylayers train --ranking out --budget 0.3 --output tuned
keylayers train --ranking out --freeze 0.25 --steps 1000 --data all.jsonl
keylayers train --ranking out --budget 17 --update full --controls all random
keylayers train --rank-first --model meta-llama/Llama-3.2-1B --data chats.jsonl --steps 1000
```
"""

app = App(help_epilogue=EXAMPLES, help_format="markdown")


@app.default
def train(
    *,
    model: Annotated[ModelOptions, flat("Model")],
    data: Annotated[DataOptions, flat("Data")],
    selection: Annotated[SelectionOptions | None, flat("Selection")] = None,
    training: Annotated[TrainingOptions, flat("Fine-tuning")] = TrainingOptions(),
    stability: Annotated[StabilityOptions, flat("When stage 1 ends")] = StabilityOptions(),
    scoring: Annotated[ScoringFlags, flat("Scoring")] = ScoringFlags(),
    output: Path = Path("tuned"),
    push_to_hub: str | None = None,
    private: bool = False,
    config: Path | None = None,
) -> None:
    """Train only the modules that a ranking and a budget select.

    Writes an ordinary PEFT adapter, or with --update full a checkpoint in which only the selected
    weights changed. Model, data and training options that are not given are those of the ranking.
    With --rank-first there is no ranking yet: it is made inside the run, and written to the output.

    Args:
        output: Folder of the adapter or checkpoint.
        push_to_hub: Upload the folder, model card and record included, to this repository of the
            hub, such as me/my-adapter.
        private: Make that repository private, if it is new.
        config: YAML file with any of these options; flags win over it.
    """
    from dataclasses import asdict

    from keylayers.commands.console import ConsoleProgress, stdout
    from keylayers.commands.push import prepare_push, push
    from keylayers.report.terminal import loss_table
    from keylayers.runs.train import train as run

    # With nothing given this says what is missing; as a default it would be made at import.
    selection = selection or SelectionOptions()
    options = TrainOptions(selection, model, data, training, stability, scoring.scoring())
    prepare_push(push_to_hub, private)
    rows = run(options, output, ConsoleProgress())
    console = stdout()
    console.print(loss_table([asdict(row) for row in rows], LOSS_UNITS[training.objective]))
    kind = "checkpoint" if training.is_full else "adapter"
    console.print(f"\n{kind} written to {output}", markup=False)
    push(output, push_to_hub)
