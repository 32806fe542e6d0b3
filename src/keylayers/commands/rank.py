# SPDX-License-Identifier: Apache-2.0
"""`keylayers rank`."""

from pathlib import Path
from typing import Annotated

from keylayers.commands import sub_command
from keylayers.commands.console import ConsoleProgress, print_result
from keylayers.commands.options import FLAT, RankOptions
from keylayers.errors import ConfigError

app = sub_command("""\
keylayers rank --model meta-llama/Llama-3.2-1B --data tatsu-lab/alpaca --output out
keylayers rank --model base --data chats.jsonl --adapter my-adapter
keylayers rank --model base --tuned instruct --data chats.jsonl --mask-batches 8
keylayers rank --config rank.yaml --seed 1
""")


@app.default
def rank(
    *,
    options: Annotated[RankOptions, FLAT],
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
        stage_1: Folder for stage 1's adapter, if several rankings share it: the first run trains
            it, the others reuse it.
        config: YAML file with any of these options. Flags take precedence.
    """
    from keylayers.commands.run_rank import run_rank
    from keylayers.report.terminal import ranking_report

    if stage_1 is not None and not (options.has_stage_1 or options.is_extracted):
        raise ConfigError(
            "`stage_1` must be left out with `adapter` or `tuned`: nothing is fine-tuned"
        )
    ranking = run_rank(options, output, ConsoleProgress(), stage_1 or output)
    print_result(ranking_report(ranking), f"written to {output / 'ranking.json'}")
