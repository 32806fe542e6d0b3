# SPDX-License-Identifier: Apache-2.0
"""`keylayers targets`."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keylayers.commands import Json, sub_command
from keylayers.errors import ConfigError
from keylayers.model.options import ModelOptions

if TYPE_CHECKING:
    from rich.table import Table

    from keylayers.apply.trained import Trained

app = sub_command("""\
keylayers targets my-adapter/adapter_config.json
keylayers targets axolotl.yaml --model mistralai/Mixtral-8x7B-v0.1
keylayers targets sft.yaml --tool trl --json
""")


@app.default
def targets(
    config: Path,
    /,
    *,
    model: str | None = None,
    revision: str | None = None,
    tool: Literal["peft", "trl", "axolotl", "llamafactory"] | None = None,
    trust_remote_code: bool = False,
    as_json: Json = False,
) -> None:
    """Show which modules a training config trains, without loading weights.

    PEFT puts the adapter on a model without storage, so names that match nothing, targets that
    PEFT rewrites in mixtures of experts and vision towers that are hit come to light.

    Args:
        config: A PEFT adapter_config.json, a LoraConfig in YAML, or the YAML of TRL, axolotl or
            LLaMA-Factory.
        model: Folder with config.json, or name on the Hub. Default: the config's own.
        revision: Revision of a model on the Hub.
        tool: The tool that reads the config. Default: by its keys.
        trust_remote_code: Run Python code of the model's repository.
        as_json: Print JSON for machines.
    """
    from keylayers.apply.configs import MODEL_KEY, tool_of, wanted
    from keylayers.apply.trained import trained_by
    from keylayers.commands.console import print_json, stdout
    from keylayers.model.loading import empty_model
    from keylayers.yaml_values import read_yaml

    content = read_yaml(config / "adapter_config.json" if config.is_dir() else config, "config")
    tool = tool or tool_of(content)
    name = model or content.get(MODEL_KEY[tool])
    if not name:
        raise ConfigError(f"the config has no `{MODEL_KEY[tool]}`; name the model with `model`")
    source = ModelOptions(model=name, revision=revision, trust_remote_code=trust_remote_code)
    empty = empty_model(source, is_as_saved=True)
    found = trained_by(wanted(tool, content, empty), empty)
    if as_json:
        print_json({"tool": tool, "model": name} | _content(found))
        return
    console = stdout()
    console.print(f"{config}, read as {tool}: {_summary(found)}", markup=False, soft_wrap=True)
    for title, table in _heatmaps(found):
        console.print(f"\n{title}", markup=False)
        console.print(table)
    if outside := _outside(found):
        shown = (f"{name} ({found.lora.get(name, 'whole')})" for name in outside)
        console.print(f"\noutside the blocks: {', '.join(shown)}", markup=False, soft_wrap=True)
    for warning in found.warnings:
        console.print(f"warning: {warning}", markup=False, soft_wrap=True)


def _summary(found: "Trained") -> str:
    num_lora = sum(info.name in found.lora for info in found.modules)
    num_whole = sum(info.name in found.whole for info in found.modules)
    parts = [
        f"{word} {count} of {len(found.modules)} modules"
        for word, count in (("LoRA on", num_lora), ("trains the weights of", num_whole))
        if count
    ]
    return f"{', '.join(parts) or 'no module of a block'}; {found.num_parameters:,} parameters"


def _outside(found: "Trained") -> list[str]:
    return sorted(found.names - {info.name for info in found.modules})


def _content(found: "Trained") -> dict[str, Any]:
    def of(name: str) -> dict[str, int | None]:
        return {"lora_rank": found.lora.get(name), "num_trained_weights": found.whole.get(name, 0)}

    return {
        "num_modules": len(found.modules),
        "num_lora_parameters": found.num_lora_parameters,
        "num_trained_parameters": found.num_parameters,
        "modules": [
            {name: getattr(info, name) for name in ("name", "block_index", "projection")}
            | of(info.name)
            for info in found.modules
        ],
        "outside": {name: of(name) for name in _outside(found)},
        "warnings": list(found.warnings),
    }


def _heatmaps(found: "Trained") -> "Iterator[tuple[str, Table]]":
    """One table per list of blocks: LoRA's rank, `all` where the weights are trained, or a dot."""
    from rich.style import Style

    from keylayers.report.terminal import block_table

    hit, missed = Style.parse("bold black on #fdea45"), Style(dim=True)
    for stack in dict.fromkeys(info.stack for info in found.modules):
        inside = [info for info in found.modules if info.stack == stack]
        first = inside[0].block_index or 0
        cells = {}
        for info in inside:
            is_hit = info.name in found.names
            text = str(found.lora.get(info.name, "all" if is_hit else "·"))
            block = str((info.block_index or 0) - first)
            cells[block, info.projection] = (text, hit if is_hit else missed)
        yield stack, block_table(cells)
