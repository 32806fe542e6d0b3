# SPDX-License-Identifier: Apache-2.0
"""The weights of two checkpoints, θ_0 and θ_t: copied, swapped and compared by parameter name."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from keylayers.errors import ModelError
from keylayers.model.modules import ModuleInfo, map_modules
from keylayers.model.options import Towers


def module_weights(
    model: nn.Module, towers: Towers = "language", device: torch.device | str = "cpu"
) -> dict[str, Tensor]:
    """A copy of the weights of all modules in the blocks, by name: θ_0 if made before training.

    Args:
        model: A model without an adapter.
        towers: Which stacks of blocks.
        device: Where the copy is kept.
    """
    infos = map_modules(model, towers)
    named = [pair for info in infos for pair in parameters_of(model, info)]
    return {name: value.detach().to(device, copy=True) for name, value in named}


@contextlib.contextmanager
def back_at_base(
    model: nn.Module, base: Mapping[str, Tensor], towers: Towers = "language"
) -> Iterator[dict[str, Tensor]]:
    """Inside the block the modules hold θ_0 again; yields what they held, θ_t, on the CPU."""
    tuned = module_weights(model, towers)
    parameters = {name: weight for name, weight in model.named_parameters() if name in tuned}
    try:
        with torch.no_grad():
            for name, weight in parameters.items():
                weight.copy_(value_like(base, name, weight, "the base weights"))
        yield tuned
    finally:
        with torch.no_grad():
            for name, weight in parameters.items():
                weight.copy_(tuned[name])


@torch.no_grad()
def take_other_weights(
    model: nn.Module, tuned: Mapping[str, Tensor], towers: Towers = "language"
) -> list[str]:
    """Copy the tuned values of everything that is not gated into `model`: embeddings, norms, head.

    Then the model with all gates open is the tuned model. Modules in the blocks keep θ_0. Returns
    the names of the parameters whose values differed.
    """
    _refuse_own_head(model, tuned)
    changed = other_differences(model, tuned, towers)
    for name in changed:
        parameter = model.get_parameter(name)
        parameter.copy_(value_like(tuned, name, parameter))
    return changed


def other_differences(
    model: nn.Module, tuned: Mapping[str, Tensor], towers: Towers = "language"
) -> list[str]:
    """The names of the parameters outside the gated modules whose values differ."""
    infos = map_modules(model, towers)
    gated = {name for info in infos for name, _ in parameters_of(model, info)}
    return [
        name
        for name, parameter in model.named_parameters()
        if name not in gated and not torch.equal(value_like(tuned, name, parameter), parameter)
    ]


def _refuse_own_head(model: nn.Module, tuned: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint with its own values for a weight that the model ties to another.

    transformers 5 ties two stored weights only if they are equal, whatever the config says.
    """
    for name, source in getattr(model, "all_tied_weights_keys", {}).items():
        is_tied = model.get_parameter(name) is model.get_parameter(source)
        if is_tied and {name, source} <= {*tuned} and not torch.equal(tuned[name], tuned[source]):
            raise ModelError(
                f"the base must have a head of its own, as the tuned checkpoint has, but it ties "
                f"{name} to {source}; save the base with `tie_word_embeddings` false and a copy "
                f"of its embeddings as {name}"
            )


def parameters_of(model: nn.Module, info: ModuleInfo) -> list[tuple[str, Tensor]]:
    """The parameters of one module by name: the experts' own, or weight and bias."""
    if info.is_stacked:
        return [(info.name, model.get_parameter(info.name))]
    own = model.get_submodule(info.name).named_parameters(recurse=False)
    return [(f"{info.name}.{name}", weight) for name, weight in own]


def difference_of(tuned: Mapping[str, Tensor], name: str, base: Tensor) -> Tensor:
    """Δθ of one parameter, a new tensor with the base's dtype and device."""
    return value_like(tuned, name, base).sub(base.detach())


def value_like(
    weights: Mapping[str, Tensor], name: str, model: Tensor, whose: str = "the tuned checkpoint"
) -> Tensor:
    """The value of one parameter, θ_t or θ_0, with the dtype and device of the model's."""
    if name not in weights:
        raise ModelError(f"{whose} must hold {name}, but it does not; is it another kind of model?")
    value = weights[name]
    if value.shape != model.shape:
        raise ModelError(
            f"the two checkpoints must have the same shapes, but {name} is {tuple(model.shape)} in "
            f"the model and {tuple(value.shape)} in {whose}"
        )
    return value.detach().to(model.device, model.dtype)
