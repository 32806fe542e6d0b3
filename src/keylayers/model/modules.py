# SPDX-License-Identifier: Apache-2.0
"""The modules of a model: which weight matrices there are, in which block, of which kind.

Found by structure (a `ModuleList` of blocks that hold linear layers or stacked experts), never by
the model's name. A module is what the paper calls a layer: one weight matrix, by its full name in
the base model, so that the name is the same whether or not PEFT has wrapped the model. A parameter
that stacks matrices of a block's experts is one module.

If a model has several stacks of blocks, an encoder and a decoder both count, and the decoder's
block numbers continue the encoder's. Towers for images or sound, which have no text embeddings, are
left out unless `towers` is "all".

Names of axes in shapes, here and elsewhere: `module` has one entry per module in model order;
`gate` one per gate; `batch`, `token`, `d_in`, `d_out` and `r` (LoRA rank) as usual.
"""

import re
from dataclasses import dataclass

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from keylayers.errors import ModelError
from keylayers.model.options import Towers


@dataclass(frozen=True)
class ModuleInfo:
    """One weight matrix, or one stack of experts' matrices, that a fine-tune can update.

    Attributes:
        name: Full name in the base model, such as `model.layers.3.self_attn.q_proj`; of experts the
            name of their parameter, such as `model.layers.3.mlp.experts.down_proj`.
        block_index: The block it is in, from 0; None outside the blocks (embeddings, head).
        projection: Its kind, the shortest ending of the name that tells the modules of a block
            apart.
        shape: (d_out, d_in) of a linear layer; of embeddings and experts as stored.
        num_parameters: Weight and bias together.
    """

    name: str
    block_index: int | None
    projection: str
    shape: tuple[int, ...]
    num_parameters: int

    @property
    def stack(self) -> str:
        """The list of blocks it is in, such as `model.layers`."""
        return re.split(r"\.\d+\.", self.name, maxsplit=1)[0]

    @property
    def last_name(self) -> str:
        """The end of the name; of experts, their parameter's name in its layer."""
        return self.name.rpartition(".")[2]

    @property
    def is_stacked(self) -> bool:
        """Whether it is one parameter that stacks the matrices of several experts."""
        return len(self.shape) == 3


def base_model_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def map_modules(model: nn.Module, towers: Towers = "language") -> tuple[ModuleInfo, ...]:
    """All linear layers and stacked experts inside the model's blocks, in model order.

    Without embeddings, norms and output head, as in the paper, and layers that are never called.
    """
    base = base_model_of(model)
    weights = _weights(base)
    found = [
        (name, index, name.removeprefix(block))
        for index, block in enumerate(f"{name}." for name in _block_names(base, towers))
        for name in weights
        if name.startswith(block) and not _is_only_read(base, name)
    ]
    kinds = _kinds([(index, path) for _, index, path in found])
    return tuple(
        ModuleInfo(name, index, kinds[path], *_size(weights[name], name))
        for name, index, path in found
    )


def outside_module(model: nn.Module, name: str) -> ModuleInfo:
    """A module that is in no block, such as the embeddings, by its name in the base model."""
    layer = linear_of(base_model_of(model).get_submodule(name))
    return ModuleInfo(name, None, name.rpartition(".")[2], *_size(layer, name))


def blocks_of(model: nn.Module, towers: Towers = "language") -> list[nn.Module]:
    """The model's blocks, in the order of `block_index`."""
    base = base_model_of(model)
    return [base.get_submodule(name) for name in _block_names(base, towers)]


def linear_of(module: nn.Module) -> nn.Module:
    """The layer inside a PEFT layer, or the module itself."""
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _experts_of(layer: nn.Module) -> list[str]:
    """Names of the three-dimensional parameters of `layer`: experts' matrices, stacked."""
    is_convolution = type(layer).__module__.startswith("torch.")  # the others have no such weights
    if is_convolution or isinstance(layer, BaseTunerLayer):
        return []
    parameters = layer.named_parameters(recurse=False)
    return [name for name, value in parameters if value.dim() == 3 and min(value.shape) > 1]


def _weights(base: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer and every experts' parameter by its name in the base model -> its layer.

    PEFT's own matrices inside a wrapped layer are not among them.
    """
    found: dict[str, nn.Module] = {}
    wrapped: list[str] = []
    for full_name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            wrapped.append(full_name + ".")
        if any(
            full_name.startswith(outer) and not full_name.startswith(outer + "base_layer")
            for outer in wrapped
        ):
            continue
        layer = linear_of(module)
        name = full_name.replace(".base_layer", "")
        for parameter in _experts_of(layer):
            found.setdefault(f"{name}.{parameter}", layer)
        if isinstance(layer, (nn.Linear, Conv1D)):
            found.setdefault(name, layer)
    return found


def _is_only_read(base: nn.Module, name: str) -> bool:
    """Whether a linear layer's weight is read but the layer never called, so that LoRA is idle."""
    mixer, _, last = name.rpartition(".")
    # The scan of a state-space mixer takes the step projection as a matrix. PEFT refuses the output
    # projection, which fused kernels read in the same way.
    return last in ("dt_proj", "out_proj") and hasattr(base.get_submodule(mixer), "A_log")


def _block_names(base: nn.Module, towers: Towers) -> list[str]:
    """Names of all blocks: members of the stacks, in model order."""
    return [
        f"{stack}.{index}"
        for stack in _stacks(base, towers)
        for index in range(len(base.get_submodule(stack)))  # type: ignore[arg-type]
    ]


def _stacks(base: nn.Module, towers: Towers) -> list[str]:
    """Names of the outermost `ModuleList`s whose members hold weights, in model order."""
    weights = _weights(base)
    stacks: list[str] = []
    for name, module in base.named_modules():
        if not isinstance(module, nn.ModuleList) or name.startswith(tuple(f"{s}." for s in stacks)):
            continue
        if any(weight.startswith(f"{name}.") for weight in weights):
            stacks.append(name)
    kind = type(base).__name__
    if not stacks:
        raise ModelError(
            f"the model must hold a list of blocks with linear layers, but {kind} has none; "
            f"keylayers works on transformer models with a `ModuleList` of blocks"
        )
    if len(stacks) == 1 or towers == "all":
        return stacks
    language = _nearest_to_embeddings(base, stacks)
    if not language:
        raise ModelError(
            f"the model must hold one list of blocks, or its text embeddings next to those of the "
            f"language model, but {kind} has {len(stacks)}: {', '.join(stacks)}"
        )
    return language


def _nearest_to_embeddings(base: nn.Module, stacks: list[str]) -> list[str]:
    """The stacks in the smallest part of the model that holds text embeddings and a stack."""
    embeddings = getattr(base, "get_input_embeddings", lambda: None)()
    name = next((name for name, module in base.named_modules() if module is embeddings), None)
    while name:
        name = name.rpartition(".")[0]
        prefix = f"{name}." if name else ""
        inside = [stack for stack in stacks if stack.startswith(prefix)]
        if inside:
            fewest = min(stack.count(".") for stack in inside)  # image towers lie deeper
            return [stack for stack in inside if stack.count(".") == fewest]
    return []


def _kinds(found: list[tuple[int, str]]) -> dict[str, str]:
    """Each path inside a block -> its kind: the shortest ending that no other path has.

    Numbers on the way are left out if the paths of a block still differ.
    """
    plain = {path: re.sub(r"\.\d+(?=\.)|^\d+\.", "", path) for _, path in found}
    places = [(block, plain[path]) for block, path in found]
    if len(set(places)) < len(places):  # such as one linear layer for each expert
        plain = {path: path for path in plain}
    kinds = {}
    for path in set(plain.values()):
        parts = path.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        others = ["." + other for other in plain.values() if other != path]
        kinds[path] = next(
            (end for end in endings if not any(other.endswith("." + end) for other in others)), path
        )
    return {path: kinds[inside] for path, inside in plain.items()}


def _size(layer: nn.Module, name: str) -> tuple[tuple[int, ...], int]:
    """Shape and number of parameters, from the layer: a quantised weight is packed."""
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = (layer.out_features, layer.in_features)
    elif isinstance(layer, Conv1D):
        shape = (layer.nf, layer.nx)
    elif isinstance(layer, nn.Embedding):
        return (layer.num_embeddings, layer.embedding_dim), layer.weight.numel()
    else:
        stacked = layer.get_parameter(name.rpartition(".")[2])
        return tuple(stacked.shape), stacked.numel()
    num_biases = shape[0] if layer.bias is not None else 0
    return shape, shape[0] * shape[1] + num_biases
