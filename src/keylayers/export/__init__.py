# SPDX-License-Identifier: Apache-2.0
"""Export a selection to other training tools: one file per tool, one table. Imports no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal, get_args

from keylayers.errors import ConfigError, OutputError
from keylayers.export import (
    axolotl,
    llamafactory,
    mergekit,
    ms_swift,
    peft,
    torchtune,
    trl,
    unsloth,
)
from keylayers.export.settings import Files, FineTune, Settings, refuse
from keylayers.files import output_folder, write_text
from keylayers.model.options import UpdateOptions
from keylayers.ranking.budget import WrittenBudget
from keylayers.ranking.ranking import Ranking

Tool = Literal[
    "peft", "trl", "axolotl", "llamafactory", "ms-swift", "torchtune", "unsloth", "mergekit"
]

TOOLS: dict[Tool, Callable[[Settings], Files]] = {
    "peft": peft.export,
    "trl": trl.export,
    "axolotl": axolotl.export,
    "llamafactory": llamafactory.export,
    "ms-swift": ms_swift.export,
    "torchtune": torchtune.export,
    "unsloth": unsloth.export,
    "mergekit": mergekit.export,
}
assert set(TOOLS) == set(get_args(Tool))
WITH_RANKS = ("peft", "axolotl")  # a rank for each module; the others have one for all


def export_selection(
    ranking: Ranking,
    budget: WrittenBudget,
    to: Tool,
    output: Path,
    *,
    kind: FineTune = "lora",
    update: UpdateOptions | None = None,
) -> list[Path]:
    """Write the files with which a tool trains, or merges, exactly the modules in `budget`.

    The model's name and LoRA's rank and alpha are those of the run that made the ranking. If
    rank-one parts are ranked, each module gets its own rank, the number of its selected parts.

    Args:
        ranking: The modules with their scores.
        budget: How much to train.
        to: The tool.
        output: Folder of the files; created if it does not exist.
        kind: LoRA on the modules, or a full fine-tune of them.
        update: The adapter or tuned checkpoint that was ranked, for a merge. Default: the one that
            the ranking names; it does not name the one that its own stage 1 wrote.

    Returns:
        The paths of the files.

    Raises:
        ConfigError: the tool cannot express exactly this selection, or there is none.
        OutputError: a file exists with other contents, or the folder cannot be written.
    """
    made_by, options = ranking.made_by, ranking.made_by.options
    model = made_by.model.name
    if model is None:
        raise ConfigError(
            "the ranking must name its model (`provenance.model.name`), but does not; "
            "rank with a model that has a name"
        )
    selection = ranking.select(budget)
    if selection.ranks is not None and (to not in WITH_RANKS or kind == "full"):
        refuse(to, f"ranks of modules are for LoRA with {' or '.join(WITH_RANKS)}")
    settings = Settings(
        selection,
        model,
        kind,
        options.lora_rank,
        options.lora_alpha,
        revision=options.revision,
        update=update or made_by.update_in(None),
        ranked=tuple(module.name for module in ranking.modules),
    )
    paths = {output / name: text for name, text in TOOLS[to](settings).items()}
    for path, text in paths.items():
        if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
            raise OutputError(
                f"an export must not replace other files, but {str(path)!r} is there with other "
                f"contents; choose another `output`, or remove it"
            )
    with output_folder(output):
        for path, text in paths.items():
            write_text(path, text)
    return list(paths)
