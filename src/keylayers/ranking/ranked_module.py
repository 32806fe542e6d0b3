# SPDX-License-Identifier: Apache-2.0
"""One module of a ranking, and the order of several. Needs no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, ConfigDict, Field, StrictBool, StrictFloat, StrictInt

from keylayers.validation import Text

if TYPE_CHECKING:
    from keylayers.model.modules import ModuleInfo

MAX_NAME_LENGTH = 1000  # far above any model's; figures and tables hold what is shorter


def _checked_name(name: str) -> str:
    if len(name) > MAX_NAME_LENGTH:
        raise ValueError(f"text of at most {MAX_NAME_LENGTH} characters")
    return name


Name = Annotated[Text, AfterValidator(_checked_name)]


@dataclass(frozen=True)
class RankedModule:
    """One module and its score. Its types are checked when it is read from a file.

    Attributes:
        name: Full name in the base model.
        block_index: The block it is in, from 0; None outside the blocks (embeddings, head).
        projection: Its kind, such as `q_proj`.
        num_parameters: Weight and bias together.
        score: Importance, higher is more; None if the method did not score it.
        standard_error: Of the score, in its unit; None where it is not known.
        is_stacked: It is one parameter that stacks the matrices of several experts.
    """

    __pydantic_config__ = ConfigDict(allow_inf_nan=False)

    name: Name
    block_index: StrictInt | None
    projection: Name
    num_parameters: Annotated[StrictInt, Field(ge=1)]
    score: StrictFloat | None
    standard_error: Annotated[StrictFloat, Field(ge=0)] | None = None
    is_stacked: StrictBool = False

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


def best_first(modules: Sequence[RankedModule]) -> list[RankedModule]:
    """The modules in order of their scores; ties stay in order, modules without a score last."""
    return sorted(modules, key=lambda module: math.inf if module.score is None else -module.score)


def are_best(modules: Sequence[RankedModule], chosen: Sequence[RankedModule]) -> bool:
    """Whether `chosen` are the best of `modules`; a budget by cost may take others."""
    names = {module.name for module in best_first(modules)[: len(chosen)]}
    return names == {module.name for module in chosen}
