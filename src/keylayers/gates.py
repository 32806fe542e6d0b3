# SPDX-License-Identifier: Apache-2.0
"""One gate for each module, block, projection or rank-one part of what a fine-tune added.

The model computes with `θ_0 + γ ⊙ Δθ`.

`gated` adds the gates, freezes everything else, and leaves no trace when its block ends.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from keylayers.errors import GuardError, ModelError
from keylayers.model.modules import linear_of
from keylayers.model.preserve import kept_frozen, preserved
from keylayers.scores.options import Granularity
from keylayers.updates import Update
from keylayers.updates.gate import Gate, Link, PartGate


class Gates:
    """The gates in a model as one vector in a fixed order.

    `groups` has, for each gate's name, the modules that the gate scales, in model order, and
    `num_parameters` what each gate's update adds to the size of an adapter if gates are of parts.
    """

    def __init__(
        self,
        gates: Mapping[str, Gate],
        groups: Mapping[str, tuple[str, ...]],
        model: nn.Module,
        num_parameters: Sequence[int] | None = None,
    ) -> None:
        self.groups = groups
        self.num_parameters = num_parameters
        self._gates = gates
        self._model = model
        self._is_checked = False

    def __len__(self) -> int:
        return len(self.groups)

    def parameters(self) -> list[nn.Parameter]:
        """The score parameters: one per gate, or one for all parts of a module."""
        return [gate.score for gate in self._gates.values()]

    def scores(self) -> Float[Tensor, " gate"]:
        """A copy of all scores, on the CPU."""
        return torch.cat([score.detach() for score in self.parameters()]).cpu()

    def set_scores(self, scores: Float[Tensor, " gate"]) -> None:
        """Set the score of every gate, in order."""
        parameters = self.parameters()
        with torch.no_grad():
            sizes = [len(parameter) for parameter in parameters]
            for parameter, values in zip(parameters, scores.split(sizes), strict=True):
                parameter.copy_(values)

    def gradient(self) -> Float[Tensor, " gate"]:
        """A copy of ∂L/∂score of all gates, on the CPU.

        Raises a GuardError if a gate took no part in the last loss, or if something other than
        gates did in the first one.
        """
        if not self._is_checked:  # once here and once at the end, since it visits all parameters
            self.check_alone()
            self._is_checked = True
        grads = {name: gate.score.grad for name, gate in self._gates.items()}
        silent = [name for name, grad in grads.items() if grad is None]
        if silent:
            raise GuardError(
                f"every gate must take part in the loss, but {len(silent)} of {len(grads)} did "
                f"not, first {', '.join(silent[:3])}; fused kernels or merged weights bypass them"
            )
        return torch.cat([grad for grad in grads.values() if grad is not None]).detach().cpu()

    @contextlib.contextmanager
    def by_example(self) -> Iterator[None]:
        """Inside the block, every example has its own copy of the gates in the next loss."""
        for gate in self._gates.values():
            gate.example_values = []
        try:
            yield
        finally:
            for gate in self._gates.values():
                gate.example_values = None

    def squared_gradients(self) -> Float[Tensor, " gate"]:
        """Sum over examples of the squared ∂L/∂γ of the last loss; inside `by_example`.

        An example is a row of the batch.
        """
        held = {
            name: [values.grad for values in gate.example_values or () if values.grad is not None]
            for name, gate in self._gates.items()  # no gradient where checkpointing computed again
        }
        numbers = {name: {len(grad) for grad in grads} for name, grads in held.items()}
        first = next(iter(numbers.values()))
        odd = [name for name, number in numbers.items() if number != first or len(number) != 1]
        if odd:
            raise ModelError(
                f"every gate must see the same examples, but those of {next(iter(numbers))} and "
                f"{odd[0]} do not (such as experts, or an embedding of positions); choose a method "
                f"that needs no single examples, such as elimination"
            )
        of_examples = (torch.stack(grads).double().sum(0) for grads in held.values())
        return torch.cat([own.flatten(0, -2).square().sum(0) for own in of_examples]).cpu()

    def check_alone(self) -> None:
        """Raise a GuardError if anything but the gates is trainable, or if gates were cast.

        A trainer that unfreezes weights in its loss would need the memory of training them. In
        half precision small steps of a gate would round to nothing.
        """
        for name, gate in self._gates.items():
            if gate.score.dtype not in (torch.float32, torch.float64):
                raise GuardError(
                    f"gates must be float32, but that of {name} became {gate.score.dtype}; "
                    f"something in the trainer casts the model while modules are scored"
                )
        gates = {id(parameter) for parameter in self.parameters()}
        others = [
            (name, "was unfrozen" if parameter.grad is None else "got a gradient")
            for name, parameter in self._model.named_parameters()
            if id(parameter) not in gates
            and (parameter.requires_grad or parameter.grad is not None)
        ]
        if others:
            name, what = others[0]
            raise GuardError(
                f"only gates may be trained while scores are learned, but the trainer's loss "
                f"trains {len(others)} other parameters, first {name}, which {what}; keep "
                f"`requires_grad` as it is inside `compute_loss`"
            )


@contextlib.contextmanager
def gated(
    model: nn.Module,
    updates: Sequence[Update],
    *,
    initial_score: float,
    granularity: Granularity = "module",
    link: Link = "sigmoid",
) -> Iterator[Gates]:
    """Gates on `updates` as the only trainable parameters of `model`, for the length of the block.

    Every score is `initial_score` at first; the paper tries 4, 2 and 1 (from memory of its text).
    γ = sigmoid(score) as in the paper, or with the link `identity` γ = score. When the block ends,
    hooks, `requires_grad` flags, gradients, train and eval modes and random state are as they were.
    """
    is_double = next(model.parameters()).dtype == torch.float64
    dtype = torch.float64 if is_double else torch.float32
    gates: dict[str, Gate]
    groups, num_parameters = gate_groups(updates, granularity), None
    if granularity == "part":
        gate_of = gates = {
            update.module.name: PartGate(initial_score, link, update.parts, dtype)
            for update in updates
        }
        num_parameters = list(part_sizes(updates).values())
    else:
        gates = {name: Gate(initial_score, link, dtype) for name in groups}
        gate_of = {module: gates[name] for name, modules in groups.items() for module in modules}
    with preserved(model), kept_frozen(model):
        for update in updates:
            gate = gate_of[update.module.name]
            gate.to(next(linear_of(update.layer).parameters()).device)
            # A child of the layer, so that the gate is one of the model's parameters.
            update.layer.add_module(f"keygate_{update.module.last_name}", gate)
            update.connect(gate)
        inside = Gates(gates, groups, model, num_parameters)
        yield inside
        inside.check_alone()


def gate_groups(updates: Sequence[Update], granularity: Granularity) -> dict[str, tuple[str, ...]]:
    """Gate name -> names of the modules that share it, both in model order."""
    if granularity == "part":
        return {name: (name.rpartition("[")[0],) for name in part_sizes(updates)}
    names: dict[str, list[str]] = {}
    for module in (update.module for update in updates):
        is_outside = module.block_index is None  # embeddings and head have a gate each
        group = {
            "module": module.name,
            "block": module.name if is_outside else f"block {module.block_index}",
            "projection": module.projection,
        }[granularity]
        names.setdefault(group, []).append(module.name)
    return {group: tuple(members) for group, members in names.items()}


def part_name(module_name: str, index: int) -> str:
    """The name of the gate of one rank-one part, counted from 0 by falling singular value."""
    return f"{module_name}[{index}]"


def part_sizes(updates: Sequence[Update]) -> dict[str, int]:
    """Name of each rank-one part, in the gates' order -> its parameters in an adapter."""
    return {
        part_name(update.module.name, index): size
        for update in updates
        for index, size in enumerate(update.parts.num_parameters)
    }
