# SPDX-License-Identifier: Apache-2.0
"""A ranking: the modules of a model in order of importance, with what made it. Needs no torch.

Higher scores mean more important. Modules with equal scores keep the model's order and share the
better rank (1, 2, 2, 4). A module without a score (`None`) comes after all others and has no rank.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from keylayers.errors import RankingError
from keylayers.files import write_json
from keylayers.ranking.budget import WrittenBudget, parse_budget
from keylayers.ranking.cost import StepTime
from keylayers.ranking.ranked_module import RankedModule, best_first
from keylayers.ranking.record import MadeBy, read_made_by
from keylayers.ranking.selection import Selection, StepMemory, select
from keylayers.validation import ListOf, Part, Text, read_json, validated

FILE = "ranking.json"  # in the folder of a run
SCHEMA = "keylayers/ranking"
SCHEMA_VERSION = 1
MAX_NAME_LENGTH = 1000  # far above any model's; figures and tables hold what is shorter


@dataclass(frozen=True)
class Ranking:
    """Modules in model order with their scores, and where they come from.

    Attributes:
        modules: In the model's order.
        method: Name of the scoring method, such as `ila`.
        granularity: `module`, `block` or `projection`: which modules share a score.
        provenance: What made the ranking, as JSON; `made_by` is its typed form.
    """

    modules: tuple[RankedModule, ...]
    method: str
    granularity: str = "module"
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = [module.name for module in self.modules]
        if not names:
            raise RankingError("a ranking must hold at least one module, got none")
        repeated = next((name for name, count in Counter(names).items() if count > 1), None)
        if repeated is not None:
            raise RankingError(f"a ranking must name each module once, but repeats {repeated}")
        for text in (self.method, *names, *self.projections):
            if len(text) > MAX_NAME_LENGTH:
                raise RankingError(
                    f"names in a ranking must have at most {MAX_NAME_LENGTH} characters, got one "
                    f"of {len(text)} that begins with {text[:40]!r}"
                )
        for module in self.modules:
            if module.score is not None and not math.isfinite(module.score):
                raise RankingError(
                    f"a score must be a finite number or None, got {module.score!r:.40} for "
                    f"{module.name}"
                )
            error = module.standard_error
            if error is not None and not 0 <= error < math.inf:
                raise RankingError(
                    f"a standard error must be a finite number from 0 or None, got {error!r:.40} "
                    f"for {module.name}"
                )
            if module.num_parameters < 1:
                raise RankingError(
                    f"a module must have parameters, got {module.num_parameters} for {module.name}"
                )

    @property
    def projections(self) -> tuple[str, ...]:
        """The kinds of its modules, in model order."""
        return tuple(dict.fromkeys(module.projection for module in self.modules))

    @property
    def is_flat(self) -> bool:
        """Nothing is ranked: several modules, and all their scores are equal."""
        return len(self.modules) > 1 and len({module.score for module in self.modules}) == 1

    @cached_property
    def made_by(self) -> MadeBy:
        """`provenance` as types.

        Raises:
            RankingError: it holds something else; files are checked when they are loaded.
        """
        return read_made_by(self.provenance, "the ranking")

    def ordered(self) -> list[RankedModule]:
        """All modules, best first; ties in model order, modules without a score last."""
        return best_first(self.modules)

    def ranks(self) -> dict[str, int | None]:
        """Module name -> rank, in model order; 1 is the most important, equal scores share it."""
        ranks: dict[str, int | None] = {}
        previous, rank = None, 0
        for place, module in enumerate(self.ordered(), start=1):
            if module.score != previous:
                previous, rank = module.score, place
            ranks[module.name] = None if module.score is None else rank
        return {module.name: ranks[module.name] for module in self.modules}

    def select(self, budget: WrittenBudget, memory: StepMemory | None = None) -> Selection:
        """The best modules that `budget` buys.

        Args:
            budget: How much, in any form of `keylayers.ranking.budget`.
            memory: What a training step holds (`keylayers.measured_memory`), for a budget in GiB.

        Raises:
            ConfigError: the budget has no known form, or buys nothing or more than there is; it is
                in GiB and `memory` is missing, or the other way round.
            RankingError: the budget reaches modules that have no score.
        """
        return select(self.modules, parse_budget(budget), self.step_time, memory)

    @property
    def step_time(self) -> StepTime:
        """What a training step of the run that made the ranking costs."""
        return StepTime(
            self.modules,
            is_full=self.made_by.options.update == "full" or self.made_by.tuned is not None,
            lora_rank=self.made_by.options.lora_rank,
            num_head_parameters=self.made_by.model.num_head_parameters,
        )

    def to_json(self) -> dict[str, Any]:
        """The ranking file's content."""
        ranks = self.ranks()
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "method": self.method,
            "granularity": self.granularity,
            "modules": [{"rank": ranks[module.name], **asdict(module)} for module in self.modules],
            "provenance": dict(self.provenance),
        }

    def save(self, path: str | Path) -> None:
        """Write the ranking file, whole or not at all."""
        write_json(Path(path), self.to_json())

    @staticmethod
    def load(path: str | Path) -> "Ranking":
        """Read a ranking file.

        Raises:
            RankingError: it is missing, cut off, of another schema, or holds values that cannot be.
        """
        path = ranking_file(path)
        content = read_json(path, "the ranking file", "keylayers rank")
        return Ranking.from_json(content, str(path))

    @staticmethod
    def from_json(content: Any, source: str) -> "Ranking":
        """The ranking in a ranking file's content.

        Args:
            content: As from `to_json`.
            source: Where it comes from, for the message.

        Raises:
            RankingError: it is of another schema, or holds values that cannot be.
        """
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise RankingError(
                f"{source!r} must be a ranking file of keylayers (schema {SCHEMA!r}), but is not"
            )
        if content.get("schema_version") != SCHEMA_VERSION:
            raise RankingError(
                f"{source!r} must have schema version {SCHEMA_VERSION}, got "
                f"{content.get('schema_version')!r:.40}; use the keylayers version that wrote it"
            )
        file = validated(_File, content, source, "keylayers rank")
        provenance = content.get("provenance", {})
        read_made_by(provenance, source)
        modules = tuple(RankedModule(**dict(row)) for row in file.modules)
        return Ranking(modules, file.method, file.granularity, provenance)


class _Row(Part):
    name: Text
    block_index: int | None = None
    projection: Text
    num_parameters: int
    score: float | None = None
    standard_error: float | None = None
    is_stacked: bool = False


class _File(Part):
    method: Text
    granularity: Text = "module"
    modules: ListOf[_Row]


def ranking_file(ranking: str | Path) -> Path:
    """The ranking file itself, where the folder of a run is given for it."""
    path = Path(ranking)
    return path / FILE if path.is_dir() else path
