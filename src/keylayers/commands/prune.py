# SPDX-License-Identifier: Apache-2.0
"""`keylayers prune`."""

from pathlib import Path
from typing import Annotated

from cyclopts import App

from keylayers.commands.config import flat
from keylayers.commands.run_options import PruneOptions
from keylayers.commands.selection import BudgetOptions
from keylayers.data.options import DataOptions
from keylayers.model.options import ModelOptions, UpdateOptions
from keylayers.training.options import ObjectiveOptions

EXAMPLES = """Examples:

```
keylayers prune --ranking out --budget 0.3
keylayers prune --ranking r.json --adapter my-adapter --freeze 0.25 --output smaller
keylayers prune --ranking r.json --model base --tuned instruct --budget auto --data chats.jsonl
```
"""

app = App(help_epilogue=EXAMPLES, help_format="markdown")


@app.default
def prune(
    *,
    selection: Annotated[BudgetOptions, flat("Selection")],
    model: Annotated[ModelOptions, flat("Model")],
    data: Annotated[DataOptions, flat("Data")],
    update: Annotated[UpdateOptions, flat("An update that exists already")] = UpdateOptions(),
    objective: Annotated[ObjectiveOptions, flat("Objective")] = ObjectiveOptions(),
    output: Path = Path("pruned"),
    push_to_hub: str | None = None,
    private: bool = False,
    config: Path | None = None,
) -> None:
    """Cut an adapter, or a tuned checkpoint, to the modules that a ranking and a budget select.

    Nothing is trained. Writes an ordinary PEFT adapter without the other modules, or a checkpoint
    in which these have the base's weights again, and shows the held-out loss before and after.
    Model, update and data that are not given are those of the ranking.

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
    from keylayers.report.prune import pruning_report
    from keylayers.runs.prune import prune as run

    options = PruneOptions(selection, model, data, update, objective)
    prepare_push(push_to_hub, private)
    found = run(options, output, ConsoleProgress())
    console = stdout()
    console.print(pruning_report(asdict(found)))
    console.print(f"\n{found.kind} written to {output}", markup=False)
    push(output, push_to_hub)
