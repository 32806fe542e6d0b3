# SPDX-License-Identifier: Apache-2.0
"""`keylayers verify`."""

from pathlib import Path
from typing import Annotated

from cyclopts import App

from keylayers.commands.config import flat
from keylayers.commands.run_options import CurveOptions, VerifyOptions
from keylayers.data.options import DataOptions
from keylayers.model.options import ModelOptions, UpdateOptions
from keylayers.training.options import ObjectiveOptions

EXAMPLES = """Examples:

```
keylayers verify --ranking out
keylayers verify --ranking out --leave-one-out --margin 0.02
keylayers verify --ranking r.json --model base --adapter my-adapter --data chats.jsonl
```
"""

app = App(help_epilogue=EXAMPLES, help_format="markdown")


@app.default
def verify(
    *,
    ranking: Path,
    model: Annotated[ModelOptions, flat("Model")],
    data: Annotated[DataOptions, flat("Data")],
    update: Annotated[UpdateOptions, flat("An update that exists already")] = UpdateOptions(),
    curve: Annotated[CurveOptions, flat("Measuring")] = CurveOptions(),
    objective: Annotated[ObjectiveOptions, flat("Objective")] = ObjectiveOptions(),
    output: Path | None = None,
    config: Path | None = None,
) -> None:
    """Measure a ranking: held-out loss with only the best modules' updates kept.

    Nothing is trained. Shows the mask curve beside random orders and the reverse order, and the
    smallest budget that is nearly as good as all modules, which `train --budget auto` takes. Model,
    update and data that are not given are those of the ranking. Writes verification.json beside
    the ranking.

    Args:
        ranking: Ranking file, or the folder that holds ranking.json.
        output: Folder for verification.json and a copy of the ranking. Not given: verification.json
            is written beside the ranking.
        config: YAML file with any of these options; flags win over it.
    """
    from keylayers.commands.console import ConsoleProgress, stdout
    from keylayers.ranking.verification import verification_file
    from keylayers.report.curve import verification_report
    from keylayers.runs.verify import verify as run

    options = VerifyOptions(model, data, update, curve, objective)
    found = run(ranking, options, ConsoleProgress(), output=output)
    console = stdout()
    console.print(verification_report(found))
    console.print(f"\nwritten to {verification_file(output or ranking)}", markup=False)
