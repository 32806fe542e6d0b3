# SPDX-License-Identifier: Apache-2.0
"""`keylayers demo`: everything that keylayers does, on the built-in model, without a network."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cyclopts import App

from keylayers.progress import Progress, Silent

if TYPE_CHECKING:
    from keylayers.commands.rank import RankOptions
    from keylayers.demo.world import Style
    from keylayers.ranking.compare import Agreement
    from keylayers.ranking.ranking import Ranking
    from keylayers.training.fine_tuning import TrainedSet

BUDGET = 0.3
EXAMPLES = """Examples:

```
keylayers demo
keylayers demo --output somewhere --seed 1
keylayers demo --output demo --files-only
```
"""

app = App(help_epilogue=EXAMPLES, help_format="markdown")


@app.default
def demo(
    *,
    output: Path = Path("out/demo"),
    seed: int = 0,
    max_steps: int = 200,
    files_only: bool = False,
) -> None:
    """Rank, show and train on the built-in model: no network, a minute or two.

    Ranks three data sets that ask the same questions and want different styles of answers, shows
    how far the rankings agree, and trains the best 30 % of the modules, all, and a random 30 %.

    Args:
        output: Folder for data, rankings and adapters.
        seed: Seed of everything that is drawn.
        max_steps: Largest number of steps of each fine-tune.
        files_only: Only write the built-in model (`model`) and the three data sets, for any other
            command or a study.
    """
    from keylayers.commands.console import ConsoleProgress, stdout
    from keylayers.demo.files import write_files
    from keylayers.report.agreement import agreement_table
    from keylayers.report.terminal import heatmap, loss_table, provenance_lines

    if files_only:
        written = write_files(output)
        stdout().print(f"{', '.join(written)} written to {output}", markup=False, soft_wrap=True)
        return
    result = run(output, seed=seed, max_steps=max_steps, progress=ConsoleProgress())
    console = stdout()
    for style, ranking in result.rankings.items():
        losses = next(line for line in provenance_lines(ranking) if line.startswith("held out"))
        console.print(f"\n[bold]{style} answers[/bold]: ranks, 1 is the most important; {losses}")
        console.print(heatmap(ranking))
    console.print(f"\n[bold]Agreement of the best {100 * BUDGET:g} %[/bold]")
    console.print(agreement_table(result.pairs, list(result.rankings)))
    first = next(iter(result.rankings))
    console.print(f"\n[bold]Training on {first} answers[/bold]")
    console.print(loss_table([asdict(row) for row in result.trained]))
    console.print(
        f"\nRankings and adapters are in {output}. Next: keylayers show {output / first}",
        markup=False,
    )


@dataclass(frozen=True)
class DemoResult:
    """The results of the demo.

    Attributes:
        rankings: A ranking for each style.
        pairs: Agreement of the rankings at the demo's budget.
        trained: Held-out losses of the base model and of what was trained.
    """

    rankings: "dict[Style, Ranking]"
    pairs: "list[Agreement]"
    trained: "list[TrainedSet]"


def demo_options(style: "Style", folder: Path, *, seed: int, max_steps: int) -> "RankOptions":
    """How the demo ranks one style, whose data are in `folder`."""
    from keylayers.commands.rank import RankOptions
    from keylayers.data.options import DataOptions
    from keylayers.demo.files import BASE
    from keylayers.model.options import ModelOptions
    from keylayers.training.options import StabilityOptions, TrainingOptions

    return RankOptions(
        model=ModelOptions(model=str(BASE), dtype="float32"),
        data=DataOptions(data=str(folder / f"{style}.jsonl")),
        training=TrainingOptions(batch_size=16, lora_rank=8, lora_alpha=16, seed=seed),
        stability=StabilityOptions(max_steps=max_steps),
    )


def run(
    output: Path, *, seed: int = 0, max_steps: int = 200, progress: Progress | None = None
) -> DemoResult:
    """Rank three styles, compare the rankings, and train on a selection.

    Args:
        output: Folder for data, rankings and adapters.
        seed: Seed of everything that is drawn.
        max_steps: Largest number of steps of each fine-tune.
        progress: Where to report to.
    """
    from keylayers.commands.rank import run as rank
    from keylayers.commands.selection import SelectionOptions
    from keylayers.commands.train import TrainOptions
    from keylayers.commands.train import run as train
    from keylayers.demo.files import write_data
    from keylayers.demo.world import STYLES
    from keylayers.files import output_folder
    from keylayers.ranking.compare import agreement

    progress = progress or Silent()
    options = {
        style: demo_options(style, output, seed=seed, max_steps=max_steps) for style in STYLES
    }
    with output_folder(output):
        for style in STYLES:
            write_data(Path(options[style].data.data), style)
    rankings: dict[Style, Ranking] = {}
    for style in STYLES:
        progress.note(f"--- {style} answers ---")
        rankings[style] = rank(options[style], output / style, progress)
    style = STYLES[0]
    own = options[style]
    selection = SelectionOptions(
        ranking=str(output / style), budget=str(BUDGET), steps=max_steps, controls=("all", "random")
    )
    progress.note(f"--- training on {style} answers ---")
    train_options = TrainOptions(
        selection=selection, model=own.model, data=own.data, training=own.training
    )
    trained = train(train_options, output / f"{style}-best", progress)
    return DemoResult(rankings, agreement(list(rankings.values()), BUDGET), trained)
