# SPDX-License-Identifier: Apache-2.0
"""`keylayers rank`."""

from pathlib import Path
from typing import Annotated

from cyclopts import App

from keylayers.commands.config import flat
from keylayers.commands.run_options import RankOptions
from keylayers.commands.scoring_flags import ScoringFlags
from keylayers.data.options import DataOptions
from keylayers.model.options import ModelOptions, UpdateOptions
from keylayers.training.options import StabilityOptions, TrainingOptions

EXAMPLES = """Examples:

```
keylayers rank --model meta-llama/Llama-3.2-1B --data tatsu-lab/alpaca --output out
keylayers rank --model base --data chats.jsonl --adapter my-adapter
keylayers rank --model base --tuned instruct --data chats.jsonl --mask-batches 8
keylayers rank --config rank.yaml --seed 1
```
"""

app = App(help_epilogue=EXAMPLES, help_format="markdown")


@app.default
def rank(
    *,
    model: Annotated[ModelOptions, flat("Model")],
    data: Annotated[DataOptions, flat("Data")],
    update: Annotated[UpdateOptions, flat("An update that exists already")] = UpdateOptions(),
    training: Annotated[TrainingOptions, flat("Fine-tuning")] = TrainingOptions(),
    stability: Annotated[StabilityOptions, flat("When stage 1 ends")] = StabilityOptions(),
    scoring: Annotated[ScoringFlags, flat("Scoring")] = ScoringFlags(),
    output: Path = Path("out"),
    stage_1: Path | None = None,
    config: Path | None = None,
) -> None:
    """Rank the modules of a model for a fine-tune.

    Stage 1 fine-tunes all modules with LoRA until the loss is stable; stage 2 freezes everything
    and scores the modules by gates on what the fine-tune added. With --adapter or --tuned only
    stage 2 runs. Writes ranking.json and stage 1's adapter.

    Args:
        output: Folder for ranking.json and the adapter.
        stage_1: Folder for the adapter instead, where rankings of the same stage 1 share it: the
            first one trains it, the others take it.
        config: YAML file with any of these options; flags win over it.
    """
    from keylayers.commands.console import ConsoleProgress, stdout
    from keylayers.report.terminal import ranking_report
    from keylayers.runs.rank import rank as run

    options = RankOptions(model, data, update, training, stability, scoring.scoring())
    ranking = run(options, output, ConsoleProgress(), stage_1_in=stage_1)
    console = stdout()
    console.print(ranking_report(ranking))
    console.print(f"\nwritten to {output / 'ranking.json'}", markup=False)
