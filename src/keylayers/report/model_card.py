# SPDX-License-Identifier: Apache-2.0
"""The model card of what keylayers trained or pruned: ranking, budget, losses, commands.

In the hub's form: metadata that its search reads, then the text of page/model_card.md. Needs no
torch.
"""

import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from markupsafe import Markup

from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import RunRecord
from keylayers.report.source import grid
from keylayers.report.templates import page_templates
from keylayers.report.terminal import in_nats

ON_THE_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")


def model_card(record: Mapping[str, Any], ranking: Ranking | None, commands: str) -> str:
    """README.md of an adapter or a checkpoint, from what is written to its keylayers.json.

    The ranking is None for stage 1, which trains all modules. `commands` repeat the run.
    """
    made = RunRecord.model_validate(record)
    is_checkpoint = made.options.tuned is not None or made.options.update == "full"
    task = "SequenceClassification" if made.options.objective == "reward" else "CausalLM"
    longest = max((len(run) for run in re.findall("`+", commands)), default=0)
    environment = page_templates(finalize=_plain, keep_trailing_newline=True)
    text = environment.get_template("model_card.md").render(
        record=made,
        name=Path(str(made.model.name)).name,
        kind="checkpoint" if is_checkpoint else "adapter",
        selection=made.selection,
        in_nats=in_nats(made.loss_unit),
        ranking=ranking,
        grid=grid(ranking) if ranking else {},
        ranks=ranking.ranks() if ranking else {},
        commands=Markup(commands),
        fence=Markup("`" * max(3, longest + 1)),  # no run of backticks in the commands ends it
        library="transformers" if is_checkpoint else "peft",
        loader=f"Auto{'' if is_checkpoint else 'Peft'}ModelFor{task}",
    )
    return f"---\n{_metadata(made, is_checkpoint).to_yaml()}\n---\n\n{text}"


def _plain(value: object) -> str:
    """Foreign text as text: neither HTML nor Markdown begins in it. `Markup` stays as it is."""
    if isinstance(value, Markup):
        return value
    escaped = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*\[\]|#~])", r"\\\1", escaped)


def _metadata(record: RunRecord, is_checkpoint: bool) -> ModelCardData:
    """What the hub's search reads; names that are folders of this machine are left out."""
    base, data = str(record.model.name), str(record.data.data)
    objective = record.options.objective
    update = "full" if is_checkpoint else record.options.update or "lora"
    return ModelCardData(
        base_model=base if _is_on_hub(base) else None,
        datasets=[data.partition(":")[0]] if _is_on_hub(data) else None,
        library_name="transformers" if is_checkpoint else "peft",
        pipeline_tag="text-classification" if objective == "reward" else "text-generation",
        tags=["keylayers", update, objective],
    )


def _is_on_hub(name: str) -> bool:
    return ON_THE_HUB.fullmatch(name) is not None and not Path(name).exists()
