# SPDX-License-Identifier: Apache-2.0
"""The modules of a model: which weight matrices there are, in which block, of which kind.

Found by structure (a `ModuleList` of blocks that hold linear layers), never by the model's name. A
module is what the paper calls a layer: one weight matrix, by its full name in the base model, so
that the name is the same whether or not PEFT has wrapped the model.

Names of axes in shapes, here and elsewhere: `module` one entry a module in model order; `gate` one
entry a gate; `batch`, `token`, `d_in`, `d_out` and `r` (LoRA rank) as usual.
"""

import re
from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from keylayers.errors import ModelError


@dataclass(frozen=True)
class ModuleInfo:
    """One weight matrix that a fine-tune can update.

    Attributes:
        name: Full name in the base model, such as `model.layers.3.self_attn.q_proj`.
        block_index: The decoder block it is in, from 0.
        projection: Its kind, the shortest ending of the name that tells the modules of a block
            apart.
        shape: (d_out, d_in).
        num_parameters: Weight and bias together.
    """

    name: str
    block_index: int
    projection: str
    shape: tuple[int, int]
    num_parameters: int


def base_model_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def map_modules(model: nn.Module) -> tuple[ModuleInfo, ...]:
    """All linear modules inside the model's blocks, in model order.

    Embeddings, norms and the output head are not among them, as in the paper.

    Args:
        model: A transformers model, wrapped by PEFT or not.

    Raises:
        ModelError: no stack of blocks, or more than one.
    """
    base = base_model_of(model)
    stack = _block_stack(base)
    pattern = re.compile(re.escape(stack) + r"\.(\d+)\.(.+)")
    found: list[tuple[str, int, str, nn.Module]] = []
    for name, linear in _linear_modules(base):
        match = pattern.fullmatch(name)
        if match:
            found.append((name, int(match[1]), match[2], linear))
    projections = _short_names(list(dict.fromkeys(path for _, _, path, _ in found)))
    return tuple(
        ModuleInfo(name, block, projections[path], _shape(linear), _num_parameters(linear))
        for name, block, path, linear in found
    )


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The model's blocks, in order.

    Raises:
        ModelError: no stack of blocks, or more than one.
    """
    base = base_model_of(model)
    return list(base.get_submodule(_block_stack(base)).children())


def module_by_name(model: nn.Module, name: str) -> nn.Module:
    """The module `name` of the base model; a PEFT layer where PEFT has put one."""
    return base_model_of(model).get_submodule(name)


def linear_of(module: nn.Module) -> nn.Module:
    """The layer inside a PEFT layer, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _linear_modules(base: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every linear layer by name; PEFT's matrices inside a wrapped layer are not among them."""
    found: list[tuple[str, nn.Module]] = []
    inside: tuple[str, ...] = ()
    for name, module in base.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, name + ".")
        if isinstance(linear_of(module), (nn.Linear, Conv1D)):
            found.append((name, linear_of(module)))
    return found


def _block_stack(base: nn.Module) -> str:
    """The name of the one outermost `ModuleList` whose members hold linear layers."""
    linear_names = [name for name, _ in _linear_modules(base)]
    stacks: list[str] = []
    for name, module in base.named_modules():
        is_nested = any(name.startswith(stack + ".") for stack in stacks)
        holds_linear = any(linear.startswith(name + ".") for linear in linear_names)
        if isinstance(module, nn.ModuleList) and holds_linear and not is_nested:
            stacks.append(name)
    kind = type(base).__name__
    if not stacks:
        raise ModelError(
            f"the model must hold a list of blocks with linear layers, but {kind} has none; "
            f"keylayers works on "
            f"transformer models with a `ModuleList` of blocks"
        )
    if len(stacks) > 1:
        raise ModelError(
            f"the model must hold one list of blocks, but {kind} has {len(stacks)}: "
            f"{', '.join(stacks)}; models "
            f"with several (encoder and decoder, vision and language) are not supported yet"
        )
    return stacks[0]


def _short_names(paths: list[str]) -> dict[str, str]:
    """Each path inside a block -> its shortest ending that no other path has."""
    short = {}
    for path in paths:
        parts = path.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        others = ["." + other for other in paths if other != path]
        short[path] = next(
            (end for end in endings if not any(other.endswith("." + end) for other in others)), path
        )
    return short


def _shape(linear: nn.Module) -> tuple[int, int]:
    """(d_out, d_in); asked of the layer, because a quantised weight is packed."""
    if isinstance(linear, nn.Linear):
        return (linear.out_features, linear.in_features)
    assert isinstance(linear, Conv1D)
    return (linear.nf, linear.nx)


def _num_parameters(linear: nn.Module) -> int:
    d_out, d_in = _shape(linear)
    return d_out * d_in + (d_out if linear.bias is not None else 0)
