# SPDX-License-Identifier: Apache-2.0
"""One module of a ranking, and the order of several. Needs no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt

from keylayers.validation import ListOf, Text

if TYPE_CHECKING:
    from keylayers.model.modules import ModuleInfo

# Far above any model's names; figures and tables hold what is shorter.
Name = Annotated[Text, Field(max_length=1000)]
Size = Annotated[StrictInt, Field(ge=1, lt=2**63)]  # a number of parameters


@dataclass(frozen=True)
class RankedModule:
    """One module and its score. Its types are checked when it is read from a file."""

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)

    name: Name  # full name in the base model
    block_index: StrictInt | None  # from 0; None outside the blocks (embeddings, head)
    projection: Name  # its kind, such as `q_proj`
    num_parameters: Size  # weight and bias together
    score: StrictFloat | None  # higher is more important; None if the method did not score it
    standard_error: Annotated[StrictFloat, Field(ge=0)] | None = None  # None if it is not known
    is_stacked: StrictBool = False  # one parameter that stacks the matrices of several experts
    # Scores of rank-one parts, by falling singular value, if these are ranked; `score` is the sum.
    part_scores: ListOf[StrictFloat] | None = None
    part_parameters: ListOf[Size] | None = None
    has_magnitude_part: StrictBool = False  # the last part is DoRA's magnitude, which has no rank

    def __post_init__(self) -> None:
        num_parts, num_sizes = (len(own or ()) for own in (self.part_scores, self.part_parameters))
        if num_parts != num_sizes:
            raise ValueError(
                f"a module with as many `part_scores` as `part_parameters`, which {self.name} "
                f"({num_parts} and {num_sizes}) is not"
            )
        if self.has_magnitude_part and num_parts < 2:
            raise ValueError(
                f"a module with a part besides DoRA's magnitude, which {self.name} is not"
            )

    @property
    def num_parts(self) -> int:
        """How many rank-one parts have scores."""
        return len(self.part_scores or ())

    @staticmethod
    def of(
        module: "ModuleInfo", score: float | None, standard_error: float | None = None
    ) -> "RankedModule":
        """A module of a model with its score."""
        position = module.name, module.block_index, module.projection, module.num_parameters
        return RankedModule(*position, score, standard_error, module.is_stacked)

    def without_parts(self) -> "RankedModule":
        """The module without its parts, for a ranking of modules."""
        return replace(self, part_scores=None, part_parameters=None, has_magnitude_part=False)


def best_first(modules: Sequence[RankedModule]) -> list[RankedModule]:
    """The modules in order of their scores; ties stay in order, modules without a score last."""
    return sorted(modules, key=lambda module: math.inf if module.score is None else -module.score)


def are_best(modules: Sequence[RankedModule], chosen: Sequence[RankedModule]) -> bool:
    """Whether `chosen` are the best of `modules`; a budget by cost may take others."""
    names = {module.name for module in best_first(modules)[: len(chosen)]}
    return names == {module.name for module in chosen}
