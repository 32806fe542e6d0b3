# SPDX-License-Identifier: Apache-2.0
"""The model card of what keylayers trained or pruned: ranking, budget, losses, commands.

In the hub's form: metadata that its search reads, then text. Needs no torch.
"""

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from keylayers.ranking.ranking import Ranking
from keylayers.ranking.record import RunRecord
from keylayers.report.terminal import in_nats

PAPER = "[Shi et al., COLM 2025](https://arxiv.org/abs/2410.17875)"
ON_THE_HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?")


def model_card(record: Mapping[str, Any], ranking: Ranking | None, commands: str) -> str:
    """README.md of an adapter or a checkpoint.

    Args:
        record: Its record, as written to keylayers.json.
        ranking: The ranking that selected its modules; None for stage 1, which trains all.
        commands: The commands that repeat the run.
    """
    made = RunRecord.model_validate(record)
    options = made.options
    is_checkpoint = options.tuned is not None or options.update == "full"
    parts = [
        f"# {_title(made)}",
        _introduction(made, ranking, is_checkpoint),
        *_losses(made),
        *_modules(made, ranking),
        "## How it was made",
        _fenced(commands, "sh"),
        _made_from(made),
        "## Use",
        _fenced(_use(options.objective, is_checkpoint), "python"),
    ]
    data = _metadata(made, is_checkpoint)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def _metadata(record: RunRecord, is_checkpoint: bool) -> ModelCardData:
    """What the hub's search reads; names that are folders of this machine are left out."""
    base, data = str(record.model.name), str(record.data.data)
    objective = record.options.objective
    update = "full" if is_checkpoint else record.options.update or "lora"
    is_reward = objective == "reward"
    return ModelCardData(
        base_model=base if _is_on_hub(base) else None,
        datasets=[data.partition(":")[0]] if _is_on_hub(data) else None,
        library_name="transformers" if is_checkpoint else "peft",
        pipeline_tag="text-classification" if is_reward else "text-generation",
        tags=["keylayers", update, objective],
    )


def _is_on_hub(name: str) -> bool:
    return ON_THE_HUB.fullmatch(name) is not None and not Path(name).exists()


def _title(record: RunRecord) -> str:
    name, selection = Path(str(record.model.name)).name, record.selection
    if selection is None:
        return f"{_plain(name)}, all modules tuned"
    return f"{_plain(name)}, {selection.num_modules} of {selection.num_candidates} modules"


def _introduction(record: RunRecord, ranking: Ranking | None, is_checkpoint: bool) -> str:
    kind = "checkpoint" if is_checkpoint else "adapter"
    base, selection = _plain(record.model.name), record.selection
    if ranking is None or selection is None:
        return (
            f"This {kind} of {base} is stage 1 of a ranking by keylayers: all modules were tuned, "
            f"so that their updates can be ranked."
        )
    share = selection.num_parameters / selection.num_candidate_parameters
    done = "was trained on" if record.result is None else "was pruned to"
    return (
        f"This {kind} of {base} {done} {selection.num_modules} of {selection.num_candidates} "
        f"weight matrices ({100 * share:.0f} % of their parameters) by keylayers, those that the "
        f"method `{_plain(ranking.method)}` ranked best; budget {_plain(selection.budget)}. The "
        f"idea is that of {PAPER}."
    )


def _losses(record: RunRecord) -> list[str]:
    """A table of held-out losses, as the command printed it."""
    rows = _loss_rows(record)
    if not rows:
        return []
    titles = ("update", "modules", "parameters", f"held-out loss{in_nats(record.loss_unit)}")
    note = f"Losses are means over {record.data.num_held_out} examples that training never saw, "
    return ["## Losses", _table(titles, rows), f"{note}in {_plain(record.loss_unit)}."]


def _loss_rows(record: RunRecord) -> list[tuple[str, str, str, str]]:
    found = record.result
    if found is None:
        rows = [
            (row.label, row.num_modules, row.num_trained_parameters, row.held_out_loss_nats)
            for row in record.results
        ]
    else:
        sizes = found.full, found.pruned
        rows = [
            ("base model", 0, 0, found.base_loss_nats),
            ("all modules", sizes[0].num_modules, sizes[0].num_parameters, found.full_loss_nats),
            ("this one", sizes[1].num_modules, sizes[1].num_parameters, found.pruned_loss_nats),
        ]
    return [
        (_plain(label), f"{num_modules:,}", f"{num_parameters:,}", f"{loss:.4f}")
        for label, num_modules, num_parameters, loss in rows
    ]


def _modules(record: RunRecord, ranking: Ranking | None) -> list[str]:
    """A table of ranks, blocks by projections; bold is what was kept or trained."""
    if ranking is None or record.selection is None:
        return []
    chosen, ranks = set(record.selection.modules), ranking.ranks()
    projections = ranking.projections
    cells: dict[int, dict[str, str]] = {}
    for module in ranking.modules:
        rank = "?" if ranks[module.name] is None else str(ranks[module.name])
        block = -1 if module.block_index is None else module.block_index
        text = f"**{rank}**" if module.name in chosen else rank
        cells.setdefault(block, {})[module.projection] = text
    rows = [
        ["outside" if block < 0 else str(block), *(row.get(name, "") for name in projections)]
        for block, row in sorted(cells.items())
    ]
    note = "Ranks, 1 is the most important; bold modules are part of this update."
    return ["## Modules", note, _table(("block", *map(_plain, projections)), rows)]


def _made_from(record: RunRecord) -> str:
    """Hashes and versions, as a list."""
    made_by, data = record.environment, record.data
    versions = ", ".join(f"{name} {version}" for name, version in made_by.libraries.items())
    lines = [
        f"base weights, SHA-256: `{record.model.weights_sha256}`",
        f"data: {_plain(data.data)}, {data.num_train} examples to train",
        f"split of the data, SHA-256: `{data.split_sha256}`",
    ]
    if record.ranking_sha256 is not None:
        lines.append(f"ranking, SHA-256 of its JSON: `{record.ranking_sha256}`")
    at = f" at {made_by.commit}" if made_by.commit else ""
    lines.append(f"keylayers {made_by.keylayers}{at}, {versions}")
    lines.append("`keylayers.json` beside this file has every option, seed and loss")
    return "\n".join(f"- {line}" for line in lines)


def _use(objective: str, is_checkpoint: bool) -> str:
    task = "SequenceClassification" if objective == "reward" else "CausalLM"
    library = "transformers" if is_checkpoint else "peft"
    name = f"AutoModelFor{task}" if is_checkpoint else f"AutoPeftModelFor{task}"
    return f'from {library} import {name}\n\nmodel = {name}.from_pretrained("this-folder")'


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fenced(text: str, language: str) -> str:
    """A block of code that no run of backticks inside can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _plain(text: object) -> str:
    """Foreign text as text: neither HTML nor Markdown begins in it."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*\[\]|#~])", r"\\\1", escaped)
