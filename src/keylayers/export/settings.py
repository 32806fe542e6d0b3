# SPDX-License-Identifier: Apache-2.0
"""What all exports share: their input, YAML and LoRA settings, and refusals."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import yaml

from keylayers.errors import ConfigError
from keylayers.ranking.selection import Selection

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

    @property
    def names(self) -> tuple[str, ...]:
        """Full names, in model order."""
        return self.selection.names

    def lora_options(self, rank: str = "lora_rank") -> dict[str, Any]:
        """Rank, by the name that the tool has for it, alpha and dropout."""
        return {rank: self.lora_rank, "lora_alpha": self.lora_alpha, "lora_dropout": 0.0}

    def shown(self) -> dict[str, Any]:
        """The fields of templates for Python: the names are source of a list, one per line."""
        names = "[\n" + "".join(f"    {name!r},\n" for name in self.names) + "]"
        model = " ".join(self.model.split())  # a comment has no line breaks
        found = {"count": len(self.names), "model": model, "names": names}
        return found | {"rank": self.lora_rank, "alpha": self.lora_alpha}


def yaml_text(content: Mapping[str, Any]) -> str:
    """YAML in the order of the keys. Values are not wrapped: an expression needs a single line."""
    return yaml.safe_dump(dict(content), sort_keys=False, width=10_000)


def refuse(tool: str, reason: str) -> NoReturn:
    """Refuse a selection that the tool cannot train exactly."""
    raise ConfigError(f"`to` {tool} must be able to train exactly the selection, but {reason}")
