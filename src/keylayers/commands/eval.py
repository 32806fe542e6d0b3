# SPDX-License-Identifier: Apache-2.0
"""`keylayers eval`."""

from pathlib import Path
from typing import Annotated

from keylayers.commands import sub_command
from keylayers.commands.console import ConsoleProgress, print_result
from keylayers.commands.options import Model, flat
from keylayers.evaluation.options import (
    BenchmarkOptions,
    ComparedOptions,
    EvalOptions,
    EvalRunOptions,
    LossOptions,
)

app = sub_command("""\
keylayers eval --model base --adapter tuned-30 tuned-all --tasks mmlu,hellaswag
keylayers eval --model base --adapter tuned --data chats.jsonl --forgetting-data known.txt
keylayers eval --model base --checkpoint tuned --tasks gsm8k
keylayers eval --model base --adapter tuned --task-folder my-tasks --tasks mine --limit 200
""")


@app.default
def eval(
    *,
    model: Model,
    compared: Annotated[ComparedOptions, flat("Compared")] = ComparedOptions(),
    benchmarks: Annotated[BenchmarkOptions, flat("Benchmarks")] = BenchmarkOptions(),
    losses: Annotated[LossOptions, flat("Gain and forgetting")] = LossOptions(),
    run: Annotated[EvalRunOptions, flat("Running")] = EvalRunOptions(),
    output: Path = Path("evaluation"),
    config: Path | None = None,
) -> None:
    """Compare a model with adapters and checkpoints: benchmarks and losses in one table.

    All models are measured on the same documents, and each difference is shown with its interval.
    Finished results are not measured again: the same command continues where it stopped. Writes
    evaluation.json and documents.parquet. Benchmarks need `pip install 'keylayers[eval]'`.

    Args:
        output: Folder of the evaluation.
        config: YAML file with any of these options. Flags take precedence.
    """
    from keylayers.evaluation.run import evaluate
    from keylayers.report.evaluation import evaluation_report

    options = EvalOptions(model, compared, benchmarks, losses, run)
    found = evaluate(options, output, ConsoleProgress())
    print_result(evaluation_report(found), f"written to {output}")
