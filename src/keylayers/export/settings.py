# SPDX-License-Identifier: Apache-2.0
"""What all exports share: their input, YAML and LoRA settings, and refusals."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import yaml

from keylayers.errors import ConfigError
from keylayers.ranking.selection import Selection

Kind = Literal["lora", "full"]
Files = Mapping[str, str]
"""File name -> text."""


@dataclass(frozen=True)
class Settings:
    """What to export.

    Attributes:
        selection: The modules to train.
        model: The base model's name or folder.
        kind: Train LoRA on the modules, or the modules' own weights.
        lora_rank: LoRA's r.
        lora_alpha: LoRA's alpha.
    """

    selection: Selection
    model: str
    kind: Kind = "lora"
    lora_rank: int = 16
    lora_alpha: int = 32

    @property
    def names(self) -> tuple[str, ...]:
        """Full names, in model order."""
        return self.selection.names

    @property
    def model_line(self) -> str:
        """The model's name without line breaks, for a comment."""
        return " ".join(self.model.split())

    @property
    def stacked(self) -> set[str] | None:
        """The names that are stacked experts; None if the model has no experts."""
        if not self.selection.is_of_mixture:
            return None
        return {module.name for module in self.selection.modules if module.is_stacked}


def python_list(names: Sequence[str]) -> str:
    """Python source of a list of the names, one per line."""
    return "[\n" + "".join(f"    {name!r},\n" for name in names) + "]"


def yaml_text(content: Mapping[str, Any]) -> str:
    """YAML in the order of the keys. Values are not wrapped: an expression needs a single line."""
    return yaml.safe_dump(dict(content), sort_keys=False, width=10_000)


def refuse(tool: str, reason: str) -> NoReturn:
    """Refuse a selection that the tool cannot train exactly.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(f"`to` {tool} must be able to train exactly the selection, but {reason}")
