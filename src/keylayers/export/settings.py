# SPDX-License-Identifier: Apache-2.0
"""What all exports share: their input, YAML and LoRA settings, and refusals."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import yaml

from keylayers.errors import ConfigError
from keylayers.model.options import UpdateOptions
from keylayers.ranking.selection import Selection
from keylayers.ranking.targets import rank_options

FineTune = Literal["lora", "full"]
Files = Mapping[str, str]
"""File name -> text."""


@dataclass(frozen=True)
class Settings:
    """What to export: LoRA on the selected modules, or a full fine-tune of them."""

    selection: Selection
    model: str
    fine_tune: FineTune
    lora_rank: int
    lora_alpha: int
    revision: str | None = None  # of the model, on the hub
    update: UpdateOptions = field(default_factory=UpdateOptions)  # what was ranked
    ranked: tuple[str, ...] = ()  # the names of all modules of the ranking

    @property
    def names(self) -> tuple[str, ...]:
        """Full names, in model order."""
        return self.selection.names

    def lora_options(self, rank: str = "lora_rank", pattern_prefix: str = "") -> dict[str, Any]:
        """Rank, by the name that the tool has for it, alpha and dropout; ranks of modules if any.

        Alphas follow the ranks, so that their ratio is that of the ranking's own run.
        """
        found: dict[str, Any] = {rank: self.lora_rank, "lora_alpha": self.lora_alpha}
        if self.selection.ranks is not None:
            scaling = self.lora_alpha / self.lora_rank
            own = rank_options(self.selection.ranks, scaling, self.selection.stacked)
            found = {rank: own["r"], "lora_alpha": own["lora_alpha"]}
            found |= {
                f"{pattern_prefix}{key}": own[key] for key in ("rank_pattern", "alpha_pattern")
            }
        return found | {"lora_dropout": 0.0}

    def shown(self) -> dict[str, Any]:
        """The fields of templates for Python: the names are source of a list, one per line."""
        names = "[\n" + "".join(f"    {name!r},\n" for name in self.names) + "]"
        model, options = " ".join(self.model.split()), self.lora_options("rank")
        found = {"count": len(self.names), "model": model, "names": names}  # no line breaks
        return found | {"rank": options["rank"], "alpha": options["lora_alpha"]}


def yaml_text(content: Mapping[str, Any]) -> str:
    """YAML in the order of the keys. Values are not wrapped: an expression needs a single line."""
    return yaml.safe_dump(dict(content), sort_keys=False, width=10_000)


def refuse(tool: str, reason: str) -> NoReturn:
    """Refuse what the tool cannot express exactly."""
    raise ConfigError(f"`to` {tool} must express exactly the selection, but {reason}")
