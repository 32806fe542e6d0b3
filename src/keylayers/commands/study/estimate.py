# SPDX-License-Identifier: Apache-2.0
"""What the cells of a study will cost, foreseen from their options: operations and memory.

Operations are twice the multiply-adds that `keylayers.ranking.cost` counts for a token, times
tokens of a step, pass or evaluation. Not counted: attention's own products, norms, the optimiser, padding,
loading and tokenising. Where only a part of the modules is trained, the lowest is taken to be in
the first block.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from keylayers.commands.scoring_flags import ScoringFlags
from keylayers.commands.study.cell_options import options_of
from keylayers.commands.study.estimate_memory import step_bytes
from keylayers.commands.study.plan import Cell
from keylayers.commands.study.sizes import (
    BYTES_PER_TOKEN,
    STORED_BYTES,
    DataSize,
    ModelShape,
    data_size,
    model_shape,
)
from keylayers.commands.verify import CurveOptions
from keylayers.data.options import DataOptions
from keylayers.model.options import ModelOptions
from keylayers.ranking.budget import Count, Fraction, Memory, Parameters, parse_budget
from keylayers.ranking.cost import StepTime
from keylayers.scores.options import Batched, Repeatable
from keylayers.training.options import StabilityOptions, TrainingOptions

OPERATIONS = 2  # a multiplication and an addition
NUM_REPEATS = 10  # runs of a method at most, with `until_stable`
NUM_LEAVE_ONE_OUT = 64  # examples that `verify --leave-one-out` looks at
FORWARD_ONLY = ("leave-one-out", "shapley")
FILE_TYPES = (".json", ".jsonl", ".csv", ".parquet")


@dataclass(frozen=True)
class Estimate:
    """What one cell will cost.

    Attributes:
        operations: Floating-point operations; None if something it depends on is not known.
        peak_bytes: The most memory that a step or pass holds; None likewise.
        unknown: What is not known; empty if all is.
    """

    operations: float | None
    peak_bytes: float | None
    unknown: str = ""


def estimate(cell: Cell) -> Estimate:
    """What a cell will cost, from its options and from what is known of its model and data."""
    options = cell.options
    if cell.kind == "evaluation":
        return Estimate(None, None, "how long evaluations take")
    model, data = str(options["model"]), str(options["data"])
    shape, size = model_shape(model), data_size(data)
    if shape is None or size is None:
        unknown = f"the shape of {model}" if shape is None else f"the size of {data}"
        return Estimate(None, None, unknown)
    job = _Job(options, shape, size)
    parts = {
        "stage-1": job.stage_1,
        "ranking": job.ranking,
        "verification": job.verification,
        "training": job.training,
    }
    multiply_adds, peak_bytes = parts[cell.kind]()
    return Estimate(OPERATIONS * multiply_adds, peak_bytes)


def downloads(cells: Iterable[Cell]) -> dict[str, int | None]:
    """Names on the hub that the cells read -> bytes to download; None where that is not known."""
    found: dict[str, int | None] = {}
    for cell in cells:
        for name, sizes in SOURCES.items():
            source = cell.options.get(name)
            if source is not None and _is_on_hub(str(source)):
                found.setdefault(str(source), sizes(str(source)))
    return found


def _is_on_hub(source: str) -> bool:
    """Whether a name is none of a file, here or missing."""
    return not Path(source).exists() and Path(source).suffix not in FILE_TYPES


def _model_bytes(name: str) -> int | None:
    shape = model_shape(name)
    return None if shape is None else STORED_BYTES * shape.num_parameters


def _data_bytes(name: str) -> int | None:
    size = data_size(name)
    return None if size is None else size.download_bytes


def _not_known(name: str) -> None:
    return None


SOURCES: Mapping[str, Callable[[str], int | None]] = {
    "model": _model_bytes,
    "data": _data_bytes,
    "adapter": _not_known,
    "tuned": _model_bytes,
}


class _Job:
    """One cell's options, with what is known of its model and data."""

    def __init__(self, options: Mapping[str, Any], shape: ModelShape, size: DataSize) -> None:
        self.options = options
        self.shape = shape
        self.model = options_of(ModelOptions, options)
        self.data = options_of(DataOptions, options)
        self.tuning = options_of(TrainingOptions, options)
        self.stability = options_of(StabilityOptions, options)
        self.scoring = options_of(ScoringFlags, options).scoring()
        self.price = _price(shape, self.tuning.update, self.tuning.lora_rank)
        limit = min(self.data.max_length, shape.max_positions)
        self.mean_tokens = min(float(limit), size.mean_bytes / BYTES_PER_TOKEN)
        longest = limit * BYTES_PER_TOKEN if size.longest_bytes is None else size.longest_bytes
        self.longest_tokens = min(float(limit), longest / BYTES_PER_TOKEN)
        num_examples = min(size.num_examples, self.data.max_examples or size.num_examples)
        held_out = self.data.held_out
        self.num_held_out = float(held_out * num_examples if held_out < 1 else held_out)

    def stage_1(self) -> tuple[float, float]:
        """Multiply-adds and bytes of a fine-tune of all modules, to its cap."""
        steps = self.stability.stage_1_cap * self._step(self.price.whole)
        return steps + self._held_out(2), self._bytes(1.0)

    def ranking(self) -> tuple[float, float]:
        """Those of scoring."""
        return self._scoring() + self._held_out(2), self._bytes(0.0)

    def verification(self) -> tuple[float, float]:
        """Those of the mask curve and of those beside it."""
        curve = options_of(CurveOptions, self.options)
        total = self._held_out((2 + curve.random_orders) * curve.points)
        if curve.leave_one_out:
            passes = (self.shape.num_modules + 1) * NUM_LEAVE_ONE_OUT + self.num_held_out
            total += passes * self.mean_tokens * self.price.forward
        return total, self._bytes(0.0)

    def training(self) -> tuple[float, float]:
        """Those of a fine-tune of a selection, and of what it is compared with."""
        steps = self.options.get("steps") or self.stability.stage_1_cap
        share, held = self._share()
        step = self.price.whole - (1 - share) * sum(self.price.own)
        budget = str(self.options.get("budget"))
        if budget.endswith("x-time"):
            step = self.price.whole * float(budget.removesuffix("x-time"))
        controls = self.options.get("controls") or ()
        controls = [controls] if isinstance(controls, str) else controls
        each = [self.price.whole if one == "all" else step for one in controls]
        total = sum(steps * self._step(one) for one in (step, *each))
        total += self._held_out(2 + len(each))
        if self.options.get("rank_first"):
            return total + self._scoring(), self._bytes(1.0)
        return total, min(held, self._bytes(1.0 if "all" in controls else share))

    def _share(self) -> tuple[float, float]:
        """Which part of the modules is trained, and the most memory that the budget allows."""
        if self.options.get("freeze") is not None:
            return 1.0 - float(self.options["freeze"]), float("inf")
        written = self.options.get("budget")
        budget = None if written is None else parse_budget(str(written))
        if isinstance(budget, Memory):
            return 1.0, budget.num_bytes
        if isinstance(budget, Parameters):
            return budget.fraction, float("inf")
        if isinstance(budget, Count):
            return budget.value / self.shape.num_modules, float("inf")
        if isinstance(budget, Fraction):
            return budget.value, float("inf")
        return 1.0, float("inf")  # the ranking will tell

    def _scoring(self) -> float:
        own = self.scoring.options
        is_repeated = isinstance(own, Repeatable) and own.until_stable is not None
        once = (
            replace(self.scoring, options=replace(own, until_stable=None))
            if is_repeated
            else self.scoring
        )
        num_passes = once.num_steps(self.shape.num_modules)
        if num_passes is None:
            num_passes = own.mask_batches if isinstance(own, Batched) else 0
        if is_repeated:
            num_passes *= NUM_REPEATS
        ways = 1 if self.scoring.method in FORWARD_ONLY else 2  # there, and back for activations
        tokens = self.tuning.batch_size * self.mean_tokens
        return num_passes * ways * tokens * self.price.forward

    def _step(self, multiply_adds: float) -> float:
        """A training step, from its multiply-adds for one token."""
        again = self.price.forward if self.tuning.gradient_checkpointing else 0
        batch = self.tuning.batch_size * self.tuning.gradient_accumulation
        return batch * self.mean_tokens * (multiply_adds + again)

    def _held_out(self, num_times: int) -> float:
        return num_times * self.num_held_out * self.mean_tokens * self.price.forward

    def _bytes(self, share: float) -> float:
        num_tokens = self.tuning.batch_size * self.longest_tokens
        return step_bytes(self.shape, self.model, self.tuning, num_tokens, share)


@cache
def _price(shape: ModelShape, update: str, lora_rank: int) -> StepTime:
    return shape.ranking({"update": update, "lora_rank": lora_rank}).step_time
