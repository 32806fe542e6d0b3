# SPDX-License-Identifier: Apache-2.0
"""`keylayers train`."""

from pathlib import Path
from typing import Annotated

from keylayers.commands import sub_command
from keylayers.commands.config import FromRanking
from keylayers.commands.console import ConsoleProgress, print_result
from keylayers.commands.options import FLAT, TrainOptions
from keylayers.training.options import LOSS_UNITS

app = sub_command(
    """\
keylayers train --ranking out --budget 0.3 --output tuned
keylayers train --ranking out --freeze 0.25 --steps 1000 --data all.jsonl
keylayers train --ranking out --budget 17 --update full --controls all random
keylayers train --rank-first --model meta-llama/Llama-3.2-1B --data chats.jsonl --steps 1000
""",
    help_formatter=FromRanking("train"),
    usage="Usage: keylayers train --ranking STR (--budget STR | --freeze FLOAT) [OPTIONS]\n"
    "       keylayers train --rank-first --model STR --data STR [OPTIONS]",
)


@app.default
def train(
    *,
    options: Annotated[TrainOptions, FLAT],
    output: Path = Path("tuned"),
    config: Path | None = None,
) -> None:
    """Train only the modules that a ranking and a budget select.

    Writes an ordinary PEFT adapter, or with --update full a checkpoint in which only the selected
    weights changed. Model, data and training options default to those of the ranking. With
    --rank-first there is no ranking yet: the run makes it and writes it to the output.

    Args:
        output: Folder of the adapter or checkpoint.
        config: YAML file with any of these options. Flags take precedence.
    """
    from keylayers.commands.run_train import run_rank_first, run_train
    from keylayers.report.terminal import loss_table

    run = run_rank_first if options.selection.rank_first else run_train
    rows = run(options, output, ConsoleProgress())
    kind = "checkpoint" if options.training.is_full else "adapter"
    unit = LOSS_UNITS[options.training.objective]
    print_result(loss_table(rows, unit), f"{kind} written to {output}")
