# SPDX-License-Identifier: Apache-2.0
"""`keylayers prune`."""

from pathlib import Path
from typing import Annotated

from keylayers.commands import sub_command
from keylayers.commands.config import FromRanking
from keylayers.commands.console import ConsoleProgress, print_result
from keylayers.commands.options import FLAT, PruneOptions

app = sub_command(
    """\
keylayers prune --ranking out --budget 0.3
keylayers prune --ranking r.json --adapter my-adapter --freeze 0.25 --output smaller
keylayers prune --ranking r.json --model base --tuned instruct --budget auto --data chats.jsonl
""",
    help_formatter=FromRanking("prune"),
    usage="Usage: keylayers prune --ranking PATH (--budget STR | --freeze FLOAT) [OPTIONS]",
)


@app.default
def prune(
    *,
    options: Annotated[PruneOptions, FLAT],
    output: Path = Path("pruned"),
    config: Path | None = None,
) -> None:
    """Cut an adapter, or a tuned checkpoint, to the modules that a ranking and a budget select.

    Nothing is trained. Writes an ordinary PEFT adapter without the other modules, or a checkpoint
    in which these have the base's weights again, and shows the held-out loss before and after.
    Model, update and data default to those of the ranking.

    Args:
        output: Folder of the adapter or checkpoint.
        config: YAML file with any of these options. Flags take precedence.
    """
    from keylayers.commands.run_prune import run_prune
    from keylayers.report.terminal import pruning_report

    found = run_prune(options, output, ConsoleProgress())
    print_result(pruning_report(found), f"{found.kind} written to {output}")
