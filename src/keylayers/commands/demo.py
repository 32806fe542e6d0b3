# SPDX-License-Identifier: Apache-2.0
"""`keylayers demo`."""

from pathlib import Path

from cyclopts import App

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
        seed: Of everything that is drawn.
        max_steps: Cap of each fine-tune.
        files_only: Only write the built-in model (`model`) and the three data sets, for any other
            command or a study.
    """
    from keylayers.commands.console import ConsoleProgress, stdout
    from keylayers.demo.run import BUDGET, rows_of, write_files
    from keylayers.demo.run import demo as run
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
    console.print(loss_table(rows_of(result)))
    console.print(
        f"\nRankings and adapters are in {output}. Next: keylayers show {output / first}",
        markup=False,
    )
