# SPDX-License-Identifier: Apache-2.0
"""`keylayers judge`."""

from pathlib import Path
from typing import Annotated

from cyclopts import App

from keylayers.commands.config import flat
from keylayers.evaluation.judge.options import (
    AnswerOptions,
    EndpointOptions,
    JudgedOptions,
    JudgeOptions,
)

EXAMPLES = """Examples:

```
keylayers judge --model base --adapter mine --questions mt-bench --judge-url URL --judge-model M
keylayers judge --config judge.yaml --dry-run
keylayers judge --config judge.yaml --mode pairwise --judge-requests-at-once 8
```
"""

app = App(help_epilogue=EXAMPLES, help_format="markdown")


@app.default
def judge(
    *,
    judged: Annotated[JudgedOptions, flat("Model")],
    answers: Annotated[AnswerOptions, flat("Questions and answers")],
    endpoint: Annotated[EndpointOptions, flat("Judge")],
    output: Path = Path("judged"),
    dry_run: bool = False,
    config: Path | None = None,
) -> None:
    """Let a model behind an endpoint judge the answers of a base model, adapters and checkpoints.

    The models answer questions of one or several turns, such as MT-Bench's. The judge rates each
    answer from 1 to 10, or compares it with the first model's in both orders. Shown are means by
    turn and category and paired differences, with intervals. Answers and replies are kept in the
    output folder: the same command goes on where it was stopped and asks nothing twice.

    Args:
        output: Folder of answers, replies and judgement.json.
        dry_run: Only show what would be asked, and what it costs at most. Nothing is written.
        config: YAML file with any of these options; flags win over it.
    """
    from dataclasses import asdict

    from keylayers.commands.console import ConsoleProgress, stdout
    from keylayers.errors import JudgeError
    from keylayers.report.judge import judgement_report, plan_table
    from keylayers.runs.judge import JUDGEMENT, plan_judge
    from keylayers.runs.judge import judge as run

    options = JudgeOptions(judged, answers, endpoint)
    console = stdout()
    if dry_run:
        plan = plan_judge(options, output)
        console.print(plan_table(asdict(plan) | dict(plan.asked.record)))
        return
    record = run(options, output, ConsoleProgress())
    console.print(judgement_report(record))
    console.print(f"\nwritten to {output / JUDGEMENT}", markup=False)
    missing = record["judge"]["num_requests"] - record["judge"]["num_replies"]
    if missing:
        raise JudgeError(
            f"the judge must reply to every request, but {missing} of "
            f"{record['judge']['num_requests']} got no reply; the same command asks them again"
        )
