# SPDX-License-Identifier: Apache-2.0
"""How much memory a training step holds when only some modules are trained. Needs no torch.

`measured_memory` of `keylayers.training.memory` measures one step of a real trainer; this file adds
up what a set of modules would hold of it. Held at the peak are

- the model's weights,
- of each trained module its parameters, their gradient and AdamW's two moments,
- what autograd keeps for the backward pass: from the lowest trained module up what gradients
  pass through, and of each trained module its own input; with gradient checkpointing the inputs
  of the blocks from there up, and one block whole,
- what the loss and one block work with beside it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from keylayers.errors import ConfigError, RankingError
from keylayers.ranking.budget import GIB, Memory
from keylayers.ranking.cost import best_within, least_price
from keylayers.ranking.ranked_module import RankedModule


@dataclass(frozen=True)
class KeptStorage:
    """One storage that autograd keeps for the backward pass.

    Attributes:
        num_bytes: Its size.
        block_index: The block that keeps it; None outside the blocks.
        kept_from: Kept, whatever is trained, if the lowest trained module's `order` is at most
            this; -1 if only trained modules keep it.
    """

    num_bytes: int
    block_index: int | None
    kept_from: int


@dataclass(frozen=True)
class ModuleMemory:
    """What a module holds when it is trained.

    Attributes:
        order: When the forward pass meets it, counted over all modules.
        state_bytes: Parameters that are trained, where they are not the model's own weights; their
            gradient and moments.
        kept: Places in `StepMemory.storages` of what it keeps.
    """

    order: int
    state_bytes: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class StepMemory:
    """One training step's memory in bytes, as it depends on what is trained.

    Attributes:
        fixed_bytes: Weights and buffers, and the state of what is trained in any case.
        working_bytes: What the loss and a block work with, beyond what is kept.
        modules: Module name -> what it holds.
        storages: Everything that some set of trained modules keeps.
        block_input_bytes: What gradient checkpointing keeps of each block; None without it.
        block_bytes: What the block that was measured keeps when it is computed anew.
        num_rows: Rows of the batch that was measured, the longest of the training data.
        num_tokens: Positions in each of its rows.
    """

    fixed_bytes: int
    working_bytes: int
    modules: Mapping[str, ModuleMemory]
    storages: tuple[KeptStorage, ...]
    block_input_bytes: int | None
    block_bytes: int
    num_rows: int
    num_tokens: int

    def of(self, names: Collection[str]) -> int:
        """Bytes at the peak of a step that trains these modules.

        Raises:
            RankingError: a name was not measured, or there is none.
        """
        return self.bill(names).total

    def bill(self, names: Collection[str]) -> "MemoryBill":
        """The same in its parts."""
        unknown = sorted(set(names) - self.modules.keys())
        if unknown or not names:
            what = unknown[0] if unknown else "none"
            raise RankingError(f"the modules must be of the step that was measured, got {what}")
        ordered = sorted(names, key=lambda name: self.modules[name].order)
        bill = MemoryBill(self, self.modules[ordered[0]])
        for name in ordered[1:]:
            bill.take(self.modules[name])
        return bill


def best_within_memory(
    modules: Sequence[RankedModule], memory: StepMemory, budget: Memory
) -> tuple[RankedModule, ...]:
    """The modules with the highest sum of scores that fit, in model order.

    Raises:
        ConfigError: no module with a positive score fits; says what the least would be.
        RankingError: the step that was measured did not train all ranked modules.
    """
    missing = [module.name for module in modules if module.name not in memory.modules]
    if missing:
        raise RankingError(
            f"memory must be measured on a step that trains every ranked module, but {missing[0]} "
            f"was not trained"
        )
    price = _StepPrice(modules, memory)
    best = best_within(modules, price, budget.num_bytes)
    if not best:
        least = least_price(modules, price) / GIB
        raise ConfigError(
            f"`budget` must allow a step of one module, which is {least:.3g}GiB with batches of "
            f"{memory.num_rows} x {memory.num_tokens} tokens, got {budget}; lower `batch_size` or "
            f"`max_length`, or use `gradient_checkpointing`"
        )
    return best


class _StepPrice:
    """Bytes of the modules of one ranking."""

    def __init__(self, modules: Sequence[RankedModule], memory: StepMemory) -> None:
        self._memory = memory
        self._modules = [memory.modules[module.name] for module in modules]
        self.order: Sequence[int] = sorted(
            range(len(self._modules)), key=lambda place: self._modules[place].order
        )

    def bill(self, lowest: int) -> "_PlaceBill":
        return _PlaceBill(MemoryBill(self._memory, self._modules[lowest]), self._modules)


class MemoryBill:
    """Bytes of a step, while modules are added above the lowest one.

    Attributes:
        largest_block: What the block that keeps most keeps.
    """

    def __init__(self, memory: StepMemory, lowest: ModuleMemory) -> None:
        self._memory = memory
        self._base = memory.fixed_bytes + memory.working_bytes
        self._kept: set[int] = set()
        self._per_block: dict[int | None, int] = {}
        self.largest_block = self._inside = self._outside = 0
        for place, storage in enumerate(memory.storages):
            if storage.kept_from >= lowest.order:
                self._keep(place)
        self.take(lowest)

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self._total(self._inside, self.largest_block, self._outside)

    def _total(self, inside: int, largest: int, outside: int) -> int:
        if self._memory.block_input_bytes is not None:
            num_blocks = sum(block is not None for block in self._per_block)
            whole = max(largest, self._memory.block_bytes)
            inside = num_blocks * self._memory.block_input_bytes + whole
        return self._base + inside + outside

    def extra(self, module: ModuleMemory) -> int:
        """What training one more would add."""
        new = [place for place in module.kept if place not in self._kept]
        inside, outside, largest = self._inside, self._outside, self.largest_block
        per_block: dict[int | None, int] = {}
        for place in new:
            storage = self._memory.storages[place]
            block = storage.block_index
            per_block[block] = per_block.get(block, 0) + storage.num_bytes
        for block, num_bytes in per_block.items():
            if block is None:
                outside += num_bytes
            else:
                inside += num_bytes
                largest = max(largest, self._per_block.get(block, 0) + num_bytes)
        return module.state_bytes + self._total(inside, largest, outside) - self.total

    def take(self, module: ModuleMemory) -> None:
        """Train one more, not below the lowest."""
        self._base += module.state_bytes
        for place in module.kept:
            self._keep(place)

    def _keep(self, place: int) -> None:
        if place in self._kept:
            return
        self._kept.add(place)
        storage = self._memory.storages[place]
        block = storage.block_index
        self._per_block[block] = self._per_block.get(block, 0) + storage.num_bytes
        if block is None:
            self._outside += storage.num_bytes
        else:
            self._inside += storage.num_bytes
            self.largest_block = max(self.largest_block, self._per_block[block])


class _PlaceBill:
    """The same by places of a ranking."""

    def __init__(self, bill: MemoryBill, modules: Sequence[ModuleMemory]) -> None:
        self._bill = bill
        self._modules = modules

    @property
    def total(self) -> float:
        return float(self._bill.total)

    def extra(self, place: int) -> float:
        # one byte at least: with checkpointing a module may add nothing
        return float(max(1, self._bill.extra(self._modules[place])))

    def add(self, place: int) -> None:
        self._bill.take(self._modules[place])
