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


@dataclass(frozen=True)
class RankedModule:
    """One module and its score. Its types are checked when it is read from a file."""

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)

    name: Name  # full name in the base model
    block_index: StrictInt | None  # from 0; None outside the blocks (embeddings, head)
    projection: Name  # its kind, such as `q_proj`
    num_parameters: Annotated[StrictInt, Field(ge=1)]  # weight and bias together
    score: StrictFloat | None  # higher is more important; None if the method did not score it
    standard_error: Annotated[StrictFloat, Field(ge=0)] | None = None  # None if it is not known
    is_stacked: StrictBool = False  # one parameter that stacks the matrices of several experts
    # Of a ranking of rank-one parts, by falling singular value; `score` is their sum.
    part_scores: ListOf[StrictFloat] | None = None
    part_parameters: ListOf[Annotated[StrictInt, Field(ge=1)]] | None = None
    has_magnitude_part: StrictBool = False  # the last part is DoRA's magnitude, which has no rank

    def __post_init__(self) -> None:
        if len(self.part_scores or ()) != len(self.part_parameters or ()):
            raise ValueError(
                f"`part_scores` and `part_parameters` of {self.name} must be as many as each other"
            )

    @staticmethod
    def of(
        module: "ModuleInfo", score: float | None, standard_error: float | None = None
    ) -> "RankedModule":
        """A module of a model with its score."""
        position = module.name, module.block_index, module.projection, module.num_parameters
        return RankedModule(*position, score, standard_error, module.is_stacked)

    def without_parts(self) -> "RankedModule":
        """The same for a ranking of modules."""
        return replace(self, part_scores=None, part_parameters=None, has_magnitude_part=False)


def best_first(modules: Sequence[RankedModule]) -> list[RankedModule]:
    """The modules in order of their scores; ties stay in order, modules without a score last."""
    return sorted(modules, key=lambda module: math.inf if module.score is None else -module.score)


def are_best(modules: Sequence[RankedModule], chosen: Sequence[RankedModule]) -> bool:
    """Whether `chosen` are the best of `modules`; a budget by cost may take others."""
    names = {module.name for module in best_first(modules)[: len(chosen)]}
    return names == {module.name for module in chosen}
