# SPDX-License-Identifier: Apache-2.0
"""The demo: everything that keylayers does, on the built-in model, without a network.

Ranks three alignment data sets that ask the same questions and differ in the style of the answers,
then trains the best 30 %, all modules and a random 30 % for the first of them.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from keylayers.commands.run_options import RankOptions, TrainOptions
from keylayers.commands.selection import SelectionOptions
from keylayers.data.options import DataOptions
from keylayers.demo.world import STYLES, Style, alignment_examples
from keylayers.errors import OutputError
from keylayers.files import output_folder, write_bytes
from keylayers.model.options import ModelOptions
from keylayers.progress import Progress, Silent
from keylayers.ranking.compare import Agreement, agreement
from keylayers.ranking.ranking import Ranking
from keylayers.runs.rank import rank
from keylayers.runs.train import train
from keylayers.runs.train_job import TrainedSet
from keylayers.training.options import StabilityOptions, TrainingOptions

BASE = Path(__file__).parent / "base"
NUM_EXAMPLES = 504
BUDGET = 0.3
MODEL = "model"


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        rankings: One for each style.
        pairs: Agreement of the rankings at the demo's budget.
        trained: Held-out losses of the base model and of what was trained.
    """

    rankings: dict[Style, Ranking]
    pairs: list[Agreement]
    trained: list[TrainedSet]


def demo_options(style: Style, folder: Path, *, seed: int, max_steps: int) -> RankOptions:
    """How the demo ranks one style, whose data are in `folder`."""
    return RankOptions(
        model=ModelOptions(model=str(BASE), dtype="float32"),
        data=DataOptions(data=str(folder / f"{style}.jsonl")),
        training=TrainingOptions(batch_size=16, lora_rank=8, lora_alpha=16, seed=seed),
        stability=StabilityOptions(max_steps=max_steps),
    )


def write_data(path: Path, style: Style) -> None:
    """Write the questions and answers of one style, one JSON object a line."""
    rows = alignment_examples(style, NUM_EXAMPLES)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_files(folder: Path) -> list[str]:
    """Write the built-in model and the data of all styles as files of the usual formats.

    Returns:
        Their names.

    Raises:
        OutputError: the folder cannot be written, or its `model` is not a copy of the built-in one.
    """
    files = {path.name: path.read_bytes() for path in sorted(BASE.iterdir())}
    with output_folder(folder), output_folder(folder / MODEL):
        for name in (path.name for path in (folder / MODEL).iterdir()):
            if name not in files:
                raise OutputError(
                    f"`output` must have room for the built-in model, but {str(folder / MODEL)!r} "
                    f"holds other files; choose another folder"
                )
        for name, content in files.items():
            write_bytes(folder / MODEL / name, content)
        for style in STYLES:
            write_data(folder / f"{style}.jsonl", style)
    return [MODEL, *(f"{style}.jsonl" for style in STYLES)]


def demo(
    output: Path, *, seed: int = 0, max_steps: int = 200, progress: Progress | None = None
) -> DemoResult:
    """Rank three styles, compare the rankings, and train on a selection.

    Args:
        output: Folder for data, rankings and adapters.
        seed: Of everything.
        max_steps: Cap of each fine-tune.
        progress: Where to report to.
    """
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
    pairs = agreement(list(rankings.values()), BUDGET)
    style = STYLES[0]
    own = options[style]
    selection = SelectionOptions(
        ranking=str(output / style),
        budget=str(BUDGET),
        steps=max_steps,
        controls=("all", "random"),
    )
    progress.note(f"--- training on {style} answers ---")
    train_options = TrainOptions(selection, own.model, own.data, own.training)
    trained = train(train_options, output / f"{style}-best", progress)
    return DemoResult(rankings, pairs, trained)


def rows_of(result: DemoResult) -> list[dict[str, object]]:
    """The trained sets for a table."""
    return [asdict(row) for row in result.trained]
