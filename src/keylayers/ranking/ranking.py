# SPDX-License-Identifier: Apache-2.0
"""A ranking: the modules of a model in order of importance, with what made it. Needs no torch.

Higher scores mean more important. Modules with equal scores keep the model's order and share the
better rank (1, 2, 2, 4). A module without a score (`None`) comes after all others and has no rank.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keylayers.errors import RankingError
from keylayers.ranking.record import check_provenance, is_number
from keylayers.records import write_json

if TYPE_CHECKING:
    from keylayers.model.modules import ModuleInfo
    from keylayers.ranking.memory import StepMemory
    from keylayers.ranking.selection import Budget, Selection

FILE = "ranking.json"  # in the folder of a run
SCHEMA = "keylayers/ranking"
SCHEMA_VERSION = 1
MAX_NAME_LENGTH = 1000  # far above any model's; figures and tables hold what is shorter


@dataclass(frozen=True)
class RankedModule:
    """One module and its score.

    Attributes:
        name: Full name in the base model.
        block_index: The block it is in, from 0; None outside the blocks (embeddings, head).
        projection: Its kind, such as `q_proj`.
        num_parameters: Weight and bias together.
        score: Importance, higher is more; None if the method did not score it.
        standard_error: Of the score, in its unit; None where it is not known.
        is_stacked: It is one parameter that stacks the matrices of several experts.
    """

    name: str
    block_index: int | None
    projection: str
    num_parameters: int
    score: float | None
    standard_error: float | None = None
    is_stacked: bool = False

    @staticmethod
    def of(
        module: "ModuleInfo", score: float | None, standard_error: float | None = None
    ) -> "RankedModule":
        """A module of a model with its score."""
        return RankedModule(
            name=module.name,
            block_index=module.block_index,
            projection=module.projection,
            num_parameters=module.num_parameters,
            score=score,
            standard_error=standard_error,
            is_stacked=module.is_stacked,
        )


@dataclass(frozen=True)
class Ranking:
    """Modules in model order with their scores, and where they come from.

    Attributes:
        modules: In the model's order.
        method: Name of the scoring method, such as `ila`.
        granularity: `module`, `block` or `projection`: which modules share a score.
        provenance: What made the ranking: model, data, options, seeds, versions, losses. JSON-able.
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
            if module.score is not None and not is_number(module.score):
                raise RankingError(
                    f"a score must be a finite number or None, got {module.score!r:.40} for "
                    f"{module.name}"
                )
            error = module.standard_error
            if error is not None and not (is_number(error) and error >= 0):
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

    def ordered(self) -> list[RankedModule]:
        """All modules, best first; ties in model order, modules without a score last."""
        return sorted(
            self.modules,
            key=lambda module: math.inf if module.score is None else -module.score,
        )

    def ranks(self) -> dict[str, int | None]:
        """Module name -> rank, in model order; 1 is the most important, equal scores share it."""
        ranks: dict[str, int | None] = {}
        previous, rank = None, 0
        for place, module in enumerate(self.ordered(), start=1):
            if module.score != previous:
                previous, rank = module.score, place
            ranks[module.name] = None if module.score is None else rank
        return {module.name: ranks[module.name] for module in self.modules}

    def select(self, budget: "Budget", memory: "StepMemory | None" = None) -> "Selection":
        """The modules that `budget` buys; forms: `keylayers.ranking.selection`."""
        from keylayers.ranking.selection import select

        return select(self, budget, memory)

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
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RankingError(
                f"the ranking file must exist, but there is no {str(path)!r}"
            ) from None
        except OSError as error:
            raise RankingError(
                f"the ranking file {str(path)!r} cannot be read: {error.strerror}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise RankingError(
                f"{str(path)!r} must be whole JSON, but it is damaged or cut off ({error}); make "
                f"it again with `keylayers rank`"
            ) from None
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
        return _from_json(content, source)


def _from_json(content: Any, path: str) -> Ranking:
    """The ranking in parsed JSON, or a RankingError that names the first thing that is wrong."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise RankingError(
            f"{path!r} must be a ranking file of keylayers (schema {SCHEMA!r}), but is not"
        )
    if content.get("schema_version") != SCHEMA_VERSION:
        raise RankingError(
            f"{path!r} must have schema version {SCHEMA_VERSION}, got "
            f"{content.get('schema_version')!r}; use the keylayers version that wrote it"
        )
    rows = content.get("modules")
    if not isinstance(rows, list):
        raise RankingError(f"{path!r} must hold a list `modules`, got {type(rows).__name__}")
    modules = tuple(_module_from_json(row, path, index) for index, row in enumerate(rows))
    provenance = content.get("provenance", {})
    check_provenance(provenance, path)
    return Ranking(
        modules, str(content.get("method")), str(content.get("granularity", "module")), provenance
    )


def _module_from_json(row: Any, path: str, index: int) -> RankedModule:
    kinds: dict[str, tuple[type, ...]] = {
        "name": (str,),
        "block_index": (int, type(None)),
        "projection": (str,),
        "num_parameters": (int,),
        "score": (int, float, type(None)),
        "standard_error": (int, float, type(None)),
    }
    if not isinstance(row, dict):
        raise RankingError(f"{path!r}: module {index} must be a mapping, got {type(row).__name__}")
    for name, kind in kinds.items():
        value = row.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            expected = " or ".join("null" if k is type(None) else k.__name__ for k in kind)
            raise RankingError(
                f"{path!r}: module {index}, {name!r} must be {expected}, got {value!r:.40}"
            )
    values: dict[str, Any] = {name: row.get(name) for name in kinds}
    for name in ("score", "standard_error"):
        if isinstance(values[name], int):
            if not is_number(values[name]):
                raise RankingError(
                    f"{path!r}: module {index}, {name!r} must be a finite number or null, got an "
                    f"integer that no float holds"
                )
            values[name] = float(values[name])
    values["is_stacked"] = row.get("is_stacked", False) is True
    return RankedModule(**values)


def ranking_file(ranking: str | Path) -> Path:
    """The ranking file itself, where the folder of a run is given for it."""
    path = Path(ranking)
    return path / FILE if path.is_dir() else path
