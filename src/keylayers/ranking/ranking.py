# SPDX-License-Identifier: Apache-2.0
"""A ranking: the modules of a model in order of importance, with what made it. Needs no torch.

Higher scores mean more important. Modules with equal scores keep the model's order and share the
better rank (1, 2, 2, 4). A module without a score (`None`) comes after all others and has no rank.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from keylayers.errors import ConfigError, RankingError
from keylayers.files import write_json
from keylayers.ranking.budget import WrittenBudget, parse_budget
from keylayers.ranking.parts import select_parts
from keylayers.ranking.ranked_module import Name, RankedModule, best_first
from keylayers.ranking.record import MadeBy
from keylayers.ranking.selection import Selection, StepMemory, StepTime, select
from keylayers.validation import ListOf, Part, Text, read_json, validated

FILE = "ranking.json"  # in the folder of a run
SCHEMA = "keylayers/ranking"
COMMAND = "keylayers rank"
OF_PARTS = ("part_scores", "part_parameters", "has_magnitude_part")  # absent in other files


@dataclass(frozen=True, repr=False)
class Ranking:
    """Modules in model order with their scores, and where they come from."""

    modules: tuple[RankedModule, ...]
    method: str  # name of the scoring method, such as `ila`
    # `module`; `block` or `projection`, whose modules share a score; or `part`, rank-one parts
    granularity: str = "module"
    provenance: Mapping[str, Any] = field(default_factory=dict)  # as JSON; as types in `made_by`

    def __post_init__(self) -> None:
        counts = Counter(module.name for module in self.modules)
        if not counts:
            raise RankingError("a ranking must hold at least one module, got none")
        name, count = counts.most_common(1)[0]
        if count > 1:
            raise RankingError(f"a ranking must name each module once, but repeats {name}")
        if self.is_of_parts and self.num_parts == 0:
            raise RankingError("a ranking of rank-one parts must hold at least one, got none")
        for module in self.modules:
            if (module.part_scores is None) == self.is_of_parts:
                raise RankingError(
                    f"a ranking must hold the scores of rank-one parts if its granularity is part, "
                    f"and only then, but it is {self.granularity} and {module.name} has "
                    f"{'none' if module.part_scores is None else 'some'}"
                )
            for number in (module.score, module.standard_error, *(module.part_scores or ())):
                if number is not None and not math.isfinite(number):
                    raise RankingError(
                        f"scores and standard errors must be a finite number or None, got {number} "
                        f"for {module.name}"
                    )

    def __repr__(self) -> str:
        """One line, as notebooks show it: all modules and their provenance would fill a page."""
        parts = f"{self.num_parts} parts of " if self.is_of_parts else ""
        return f"<Ranking of {parts}{len(self.modules)} modules, {self.method}>"

    @property
    def projections(self) -> tuple[str, ...]:
        """The kinds of its modules, in model order."""
        return tuple(dict.fromkeys(module.projection for module in self.modules))

    @property
    def is_of_parts(self) -> bool:
        """Whether rank-one parts are ranked, and modules by the sums of their parts' scores."""
        return self.granularity == "part"

    @property
    def num_parts(self) -> int:
        """How many rank-one parts are ranked; 0 if modules are."""
        return sum(module.num_parts for module in self.modules)

    @property
    def is_flat(self) -> bool:
        """Nothing is ranked: several modules, and all their scores are equal."""
        return len(self.modules) > 1 and len({module.score for module in self.modules}) == 1

    @cached_property
    def made_by(self) -> MadeBy:
        """`provenance` as types."""
        return MadeBy.model_validate(self.provenance)

    def ordered(self) -> list[RankedModule]:
        """All modules, best first; ties in model order, modules without a score last."""
        return best_first(self.modules)

    def ranks(self) -> dict[str, int | None]:
        """Module name -> rank, in model order; 1 is the most important, equal scores share it."""
        scores = sorted(-module.score for module in self.modules if module.score is not None)

        def rank(score: float | None) -> int | None:
            return None if score is None else bisect_left(scores, -score) + 1

        return {module.name: rank(module.score) for module in self.modules}

    def select(
        self, budget: WrittenBudget, memory: StepMemory | None = None, *, rank_multiple: int = 1
    ) -> Selection:
        """The best modules, or rank-one parts, that `budget` buys.

        Args:
            budget: How much, in any form of `keylayers.ranking.budget`.
            memory: What a training step holds (`keylayers.measured_memory`), for a budget in GiB.
            rank_multiple: If parts are ranked, every module's rank is a multiple of this.

        Raises:
            ConfigError: the budget has no known form, buys nothing, or does not go with `memory`.
            RankingError: the budget reaches modules that have no score.
        """
        if self.is_of_parts:
            return select_parts(self.modules, parse_budget(budget), rank_multiple)
        if rank_multiple != 1:
            raise ConfigError(
                f"ranks are decided by a ranking of rank-one parts, but this one is by "
                f"{self.granularity}; rank with `granularity` part"
            )
        return select(self.modules, parse_budget(budget), self.step_time, memory)

    @property
    def step_time(self) -> StepTime:
        """What a training step of the run that made the ranking costs."""
        return StepTime(self.modules, self.made_by)

    def to_json(self) -> dict[str, Any]:
        """The ranking file's content."""
        ranks = self.ranks()

        def fields(module: RankedModule) -> dict[str, Any]:
            left_out = () if module.part_scores is not None else OF_PARTS
            return {key: value for key, value in asdict(module).items() if key not in left_out}

        return {
            "schema": SCHEMA,
            "schema_version": 1,
            "method": self.method,
            "granularity": self.granularity,
            "modules": [{"rank": ranks[module.name], **fields(module)} for module in self.modules],
            "provenance": dict(self.provenance),
        }

    def save(self, path: str | Path) -> None:
        """Write the ranking file, whole or not at all."""
        write_json(Path(path), self.to_json())

    @staticmethod
    def load(path: str | Path) -> "Ranking":
        """Read a ranking file, or that of a folder; a RankingError says what is wrong with it."""
        path = ranking_file(path)
        return Ranking.from_json(read_json(path, "the ranking file", COMMAND), str(path))

    @staticmethod
    def from_json(content: Any, source: str) -> "Ranking":
        """The ranking in a ranking file's content; `source` is its name in messages."""
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise RankingError(
                f"{source!r} must be a ranking file of keylayers (schema {SCHEMA!r}), but is not"
            )
        file = validated(_File, content, source, COMMAND)
        return Ranking(file.modules, file.method, file.granularity, content.get("provenance", {}))


class _File(Part):
    schema_version: Literal[1]
    method: Name
    granularity: Text = "module"
    modules: ListOf[RankedModule]
    provenance: MadeBy = MadeBy()


def ranking_file(ranking: str | Path) -> Path:
    """The ranking file itself, where the folder of a run is given for it."""
    path = Path(ranking)
    return path / FILE if path.is_dir() else path
