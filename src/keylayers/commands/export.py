# SPDX-License-Identifier: Apache-2.0
"""`keylayers export`."""

from pathlib import Path

from keylayers.commands import sub_command
from keylayers.export import Tool
from keylayers.export.settings import FineTune

app = sub_command("""\
keylayers export out --budget 0.3 --to peft
keylayers export out --freeze 0.25 --to axolotl --update full --output axolotl
keylayers export out --budget 0.3 --to mergekit
""")


@app.default
def export(
    ranking: Path,
    /,
    *,
    to: Tool,
    budget: str | None = None,
    freeze: float | None = None,
    update: FineTune = "lora",
    output: Path = Path("exported"),
) -> None:
    """Write the files with which a tool trains or merges exactly the selected modules.

    LoRA's rank and alpha and the model's name are those of the ranking's own run. What a tool
    cannot express exactly is refused; docs/exports.md has the reasons.

    Args:
        ranking: Ranking file, or the folder that holds ranking.json.
        to: The tool.
        budget: How much is trained or merged, as for `keylayers train`: 0.3, 17, 0.3x-params,
            0.6x-time or auto.
        freeze: Instead of a budget: train all but this share of the modules, for example 0.25.
        update: LoRA on the modules, or a full fine-tune of them.
        output: Folder of the files.
    """
    from keylayers.commands.console import stdout
    from keylayers.commands.options import BudgetOptions
    from keylayers.export import export_selection
    from keylayers.ranking.ranking import Ranking, ranking_file

    loaded = Ranking.load(ranking)
    wanted = BudgetOptions(ranking=str(ranking), budget=budget, freeze=freeze).budget_for(loaded)
    ranked = loaded.made_by.update_in(ranking_file(ranking).parent)
    for path in export_selection(loaded, wanted, to, output, kind=update, update=ranked):
        stdout().print(f"{path} written", markup=False)
