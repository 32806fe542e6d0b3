# SPDX-License-Identifier: Apache-2.0
"""What an export is made of, and how it refuses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import yaml

from keylayers.errors import ConfigError
from keylayers.ranking.selection import Selection

Kind = Literal["lora", "full"]
Files = Mapping[str, str]
"""File name -> its text."""


@dataclass(frozen=True)
class Settings:
    """What is exported.

    Attributes:
        selection: The modules to train.
        model: The base model's name or folder.
        kind: LoRA on the modules, or the modules' weights themselves.
        lora_rank: Rank r.
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
        """The model's name for a comment, which ends with its line."""
        return " ".join(self.model.split())

    @property
    def stacked(self) -> set[str] | None:
        """Those of the names that are stacked experts; None if the model has no experts."""
        if not self.selection.is_of_mixture:
            return None
        return {module.name for module in self.selection.modules if module.is_stacked}


def python_list(names: Sequence[str]) -> str:
    """The names as Python has them, one a line."""
    return "[\n" + "".join(f"    {name!r},\n" for name in names) + "]"


def yaml_text(content: Mapping[str, Any]) -> str:
    """YAML in the order of the keys, each value on one line, as expressions must be."""
    return yaml.safe_dump(dict(content), sort_keys=False, width=10_000)


def refuse(tool: str, reason: str) -> NoReturn:
    """Raise a ConfigError: the tool cannot train exactly these modules.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(f"`to` {tool} must be able to train exactly the selection, but {reason}")
