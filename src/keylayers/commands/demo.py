# SPDX-License-Identifier: Apache-2.0
"""`keylayers demo`: everything that keylayers does, on the built-in model, without a network."""

from pathlib import Path

from keylayers.commands import sub_command
from keylayers.demo.world import BASE, STYLES, Style, write_data
from keylayers.errors import OutputError
from keylayers.files import STAGE_1_ADAPTER, output_folder, write_bytes

TRAINED: Style = "terse"  # the answers on which choices are compared
BUDGET = 0.1  # there a random 30 % trains nearly as well as the best 30 %, a random 10 % does not
AGREED = 0.3  # the share of the best modules whose agreement is shown
NUM_POINTS, NUM_RANDOM_ORDERS = 11, 3  # of the mask curve
MODEL = "model"  # the folder of the built-in model

app = sub_command("""\
keylayers demo
keylayers demo --output somewhere --seed 1
keylayers demo --output demo --files-only
""")


@app.default
def demo(
    *,
    output: Path = Path("out/demo"),
    seed: int = 0,
    max_steps: int = 200,
    files_only: bool = False,
) -> None:
    """Rank, verify and train on the built-in model: no network, about two minutes.

    Ranks the modules for three data sets with the same questions and different styles of answers,
    and shows how far the rankings agree. For one style, measures the loss with only the best
    updates kept, and trains the best 10 %, a random 10 % and all modules from scratch.

    Args:
        output: Folder for data, rankings and adapters.
        seed: Seed of everything that is drawn.
        max_steps: Largest number of steps of each fine-tune.
        files_only: Only write the built-in model (`model`) and the three data sets, for any other
            command or a study.
    """
    from keylayers.commands.console import ConsoleProgress, stdout
    from keylayers.commands.options import (
        MeasuringOptions,
        RankOptions,
        SelectionOptions,
        TrainOptions,
        VerifyOptions,
    )
    from keylayers.commands.run_rank import run_rank
    from keylayers.commands.run_train import run_train
    from keylayers.commands.run_verify import run_verify
    from keylayers.data.options import DataOptions
    from keylayers.model.options import ModelOptions, UpdateOptions
    from keylayers.ranking.compare import agreement
    from keylayers.report.agreement import agreement_table
    from keylayers.report.curve import verification_report
    from keylayers.report.terminal import heatmap, loss_table, provenance_lines
    from keylayers.training.options import StabilityOptions, TrainingOptions

    console, progress = stdout(), ConsoleProgress()
    if files_only:
        written = _write_files(output)
        console.print(f"{', '.join(written)} written to {output}", markup=False, soft_wrap=True)
        return
    model = ModelOptions(model=str(BASE), dtype="float32")
    training = TrainingOptions(batch_size=16, lora_rank=8, lora_alpha=16, seed=seed)
    stability = StabilityOptions(max_steps=max_steps)
    data = {style: DataOptions(data=str(output / f"{style}.jsonl")) for style in STYLES}
    with output_folder(output):
        for style in STYLES:
            write_data(Path(data[style].data), style)
    rankings = {}
    for style in STYLES:
        progress.note(f"--- {style} answers ---")
        options = RankOptions(model=model, data=data[style], training=training, stability=stability)
        rankings[style] = run_rank(options, output / style, progress, output / style)
    progress.note(f"--- {TRAINED} answers: the curve, and training from scratch ---")
    ranked = output / TRAINED
    measuring = VerifyOptions(
        model=model,
        data=data[TRAINED],
        update=UpdateOptions(adapter=str(ranked / STAGE_1_ADAPTER)),
        curve=MeasuringOptions(points=NUM_POINTS, random_orders=NUM_RANDOM_ORDERS),
    )
    verified = run_verify(ranked, measuring, progress)
    selection = SelectionOptions(
        ranking=str(ranked),
        budget=str(BUDGET),
        steps=max(1, max_steps // 2),
        controls=("all", "random"),
    )
    wanted = TrainOptions(selection=selection, model=model, data=data[TRAINED], training=training)
    trained = run_train(wanted, output / f"{TRAINED}-best", progress)
    for style, ranking in rankings.items():
        losses = next(line for line in provenance_lines(ranking) if line.startswith("held out"))
        console.print(f"\n[bold]{style} answers[/bold]: ranks, 1 is the most important; {losses}")
        console.print(heatmap(ranking))
    console.print(f"\n[bold]Agreement of the best {100 * AGREED:g} %[/bold]")
    console.print(agreement_table(agreement(list(rankings.values()), AGREED), list(rankings)))
    console.print(f"\n[bold]{TRAINED} answers[/bold]: the best updates kept, nothing retrained")
    console.print(verification_report(verified))
    console.print(
        f"\n[bold]{TRAINED} answers[/bold]: {100 * BUDGET:g} % of the modules, trained from scratch"
    )
    console.print(loss_table(trained))
    console.print(
        f"\nRankings and adapters are in {output}. Next: keylayers show {ranked}",
        markup=False,
    )


def _write_files(folder: Path) -> list[str]:
    """Write the built-in model and the data of all styles; returns the names of the files."""
    files = {path.name: path.read_bytes() for path in sorted(BASE.iterdir())}
    with output_folder(folder), output_folder(folder / MODEL):
        if {path.name for path in (folder / MODEL).iterdir()} - files.keys():
            raise OutputError(
                f"`output` must have room for the built-in model, but {str(folder / MODEL)!r} "
                f"holds other files; choose another folder"
            )
        for name, content in files.items():
            write_bytes(folder / MODEL / name, content)
        for style in STYLES:
            write_data(folder / f"{style}.jsonl", style)
    return [MODEL, *(f"{style}.jsonl" for style in STYLES)]
