# SPDX-License-Identifier: Apache-2.0
"""`keylayers verify`."""

from pathlib import Path
from typing import Annotated

from keylayers.commands import sub_command
from keylayers.commands.config import FromRanking
from keylayers.commands.console import ConsoleProgress, print_result
from keylayers.commands.options import FLAT, VerifyOptions

app = sub_command(
    """\
keylayers verify --ranking out
keylayers verify --ranking out --leave-one-out --margin 0.02
keylayers verify --ranking r.json --model base --adapter my-adapter --data chats.jsonl
""",
    help_formatter=FromRanking("verify"),
    usage="Usage: keylayers verify --ranking PATH [OPTIONS]",
)


@app.default
def verify(
    *,
    ranking: Path,
    options: Annotated[VerifyOptions, FLAT],
    output: Path | None = None,
    config: Path | None = None,
) -> None:
    """Measure a ranking: held-out loss with only the best modules' updates kept.

    Nothing is trained. Shows the mask curve with random orders and the reverse order for
    comparison, and the smallest budget that is nearly as good as all modules, which
    `train --budget auto` takes. Model, update and data default to those of the ranking. Writes
    verification.json next to the ranking.

    Args:
        ranking: Ranking file, or the folder that holds ranking.json.
        output: Folder for verification.json and a copy of the ranking. Default: verification.json
            is written next to the ranking.
        config: YAML file with any of these options. Flags take precedence.
    """
    from keylayers.commands.run_verify import run_verify
    from keylayers.ranking.verification import verification_file
    from keylayers.report.curve import verification_report

    found = run_verify(ranking, options, ConsoleProgress(), output)
    print_result(verification_report(found), f"written to {verification_file(output or ranking)}")
