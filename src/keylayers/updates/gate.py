# SPDX-License-Identifier: Apache-2.0
"""The number that scales an update, and what every kind of update offers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from keylayers.errors import ModelError
from keylayers.model.modules import ModuleInfo
from keylayers.model.sharding import whole

Link = Literal["sigmoid", "identity"]
EVERY = ("module", "block", "projection", "part")  # granularities


class Gate(nn.Module):
    """A number that scales one module's update, or those of a group of modules.

    `score` has shape (1,), because FSDP2 refuses scalar parameters
    (https://github.com/pytorch/pytorch/issues/130810), and is float32 (float64 in a float64 model),
    because small steps are lost to rounding in bfloat16.
    """

    def __init__(
        self, score: float, link: Link, dtype: torch.dtype = torch.float32, size: int = 1
    ) -> None:
        super().__init__()
        self.score = nn.Parameter(torch.full((size,), score, dtype=dtype))
        self.link = link
        self.example_values: list[Tensor] | None = None  # filled by `forward` while it is a list

    def value(self) -> Float[Tensor, " part"]:
        """γ: the sigmoid of the score, or the score itself."""
        return torch.sigmoid(self.score) if self.link == "sigmoid" else self.score

    def forward(self, hidden: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """`γ * hidden`, in the dtype of `hidden`."""
        return hidden * self.value_for(hidden).to(hidden.device, hidden.dtype)

    def value_for(self, hidden: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """γ, to be multiplied with `hidden`.

        With `example_values`, every example (the first dimension of `hidden`) has its own copy of γ
        there, whose gradient is that of the example alone.
        """
        value = self.value()
        if self.example_values is None or not torch.is_grad_enabled():
            return value
        own = value.expand(len(hidden), *(1,) * (hidden.dim() - 2), len(value))
        own.retain_grad()
        self.example_values.append(own)
        return own


class PartGate(Gate):
    """A number for each rank-one part `σ_j u_j v_jᵀ` of a LoRA update `B A`.

    It stands on the output of A. No weight changes: `down` turns this output into the parts'
    coordinates and `up` turns them back, so that `B up diag(γ) down A` is the gated update.
    """

    down: Float[Tensor, "*expert direction lora_rank"]
    up: Float[Tensor, "*expert lora_rank direction"]

    def __init__(self, score: float, link: Link, basis: "PartBasis", dtype: torch.dtype) -> None:
        super().__init__(score, link, dtype, len(basis.num_parameters))
        for name in ("down", "up"):  # not in the state dict, which must not change
            self.register_buffer(name, getattr(basis, name).to(dtype), persistent=False)

    def forward(self, hidden: Float[Tensor, "... lora_rank"]) -> Float[Tensor, "... lora_rank"]:
        """`up diag(γ) down` on the output of A, in the dtype of `hidden`."""
        parts = hidden.to(self.down.dtype) @ self.down.mT
        value = self.value_for(hidden)[..., : parts.shape[-1]]
        return ((parts * value) @ self.up.mT).to(hidden.dtype)


@dataclass(frozen=True)
class PartBasis:
    """The rank-one parts of one module's update, by falling singular value.

    Attributes:
        singular_values: Of the whole update, its scaling included; of stacked experts the root of
            the sum of squares over the experts.
        num_parameters: What each part adds to the size of an adapter.
        down: From the output of A to the parts' coordinates; DoRA's last part, its magnitude, has
            none.
        up: Back again.
    """

    singular_values: Float[Tensor, " part"]
    num_parameters: tuple[int, ...]
    down: Float[Tensor, "*expert direction lora_rank"]
    up: Float[Tensor, "*expert lora_rank direction"]

    @staticmethod
    def of(
        a: Float[Tensor, "*expert lora_rank d_in"],
        b: Float[Tensor, "*expert d_out lora_rank"],
        scaling: float,
    ) -> "PartBasis":
        """The singular value decomposition of `scaling · B A`, through the small factors of both.

        With `A = R_aᵀ Q_aᵀ` and `B = Q_b R_b`, it is that of `R_b R_aᵀ`, an r x r matrix. On the
        CPU, because not every accelerator has float64.
        """
        r_a = torch.linalg.qr(a.cpu().double().mT).R
        r_b = torch.linalg.qr(b.cpu().double()).R
        left, values, right = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
        largest = values.amax(-1, keepdim=True)
        is_part = values > largest * torch.finfo(torch.float64).eps * a.shape[-2]
        root = torch.where(is_part, values, 1).rsqrt() * is_part
        cost = (a.shape[-1] + b.shape[-2]) * math.prod(a.shape[:-2])
        return PartBasis(
            singular_values=scaling * values.reshape(-1, values.shape[-1]).norm(dim=0),
            num_parameters=(cost,) * values.shape[-1],
            down=root[..., :, None] * (left.mT @ r_b),
            up=(r_a.mT @ right.mT) * root[..., None, :],
        )

    def cut(
        self,
        a: Float[Tensor, "*expert lora_rank d_in"],
        b: Float[Tensor, "*expert d_out lora_rank"],
        scaling: float,
        kept: Sequence[int],
    ) -> tuple[Float[Tensor, "*expert rank d_in"], Float[Tensor, "*expert d_out rank"]]:
        """New A and B that hold the kept parts; their scaling is 1, and both have `√σ_j`."""
        root, kept = scaling**0.5, list(kept)
        new_a = root * self.down[..., kept, :] @ a.cpu().double()
        return new_a, root * b.cpu().double() @ self.up[..., kept]


@dataclass(frozen=True)
class Update(ABC):
    """What a fine-tune added to one module; `layer` computes with it."""

    # Granularities at which its gate scales nothing of single examples: they have no gradient.
    without_examples: ClassVar[Collection[str]] = ()

    module: ModuleInfo
    layer: nn.Module

    @abstractmethod
    def delta(self) -> Float[Tensor, "..."]:
        """The whole update, Δθ, in float32: (d_out, d_in), or as an embedding or experts store it.

        Of a weight with a bias, the update of the weight.
        """

    @abstractmethod
    def connect(self, gate: Gate) -> None:
        """Let the layer compute with `gate` times the update.

        Changes only attributes of modules (hooks, children, methods), which `preserved` restores.
        """

    @cached_property
    def parts(self) -> PartBasis:
        """Its rank-one parts, found once; a ModelError if it has none that a gate can scale."""
        raise ModelError(
            f"a gate for each rank-one part needs a LoRA update, but {self.module.name} was "
            f"fine-tuned as a whole; make an adapter of the difference with `keylayers extract`"
        )


@dataclass(frozen=True)
class AdapterUpdate(Update):
    """An update that a PEFT layer holds for one adapter."""

    layer: LoraLayer
    adapter: str

    @cached_property
    def parts(self) -> PartBasis:
        """The singular value decomposition of `scaling * B A`."""
        return PartBasis.of(*self.factors())

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A (r, d_in), B (d_out, r), whole even where FSDP2 shards them, and their scaling."""
        layer, name = self.layer, self.adapter
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        return whole(a), whole(b), layer.scaling[name]

    @abstractmethod
    def cut(self, kept: Sequence[int]) -> dict[str, Tensor]:
        """What PEFT saves for this layer with the kept parts alone, by name, at a scaling of 1."""


class ProductUpdate(AdapterUpdate):
    """An update that is `scaling * B A` and nothing else."""

    def cut(self, kept: Sequence[int]) -> dict[str, Tensor]:
        """A and B of the kept parts."""
        return self.stored(*self.parts.cut(*self.factors(), kept))

    def stored(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        """What PEFT saves for this layer if these are its `factors`, by name."""
        return {"lora_A.weight": a, "lora_B.weight": b}


def cover_in_forward(layer: nn.Module, name: str, value: Callable[[], Any]) -> None:
    """Let `value()` cover a parameter of `layer` during every forward pass, even one that fails."""

    def cover(*_: Any) -> None:
        vars(layer)[name] = value()

    def uncover(*_: Any) -> None:
        vars(layer).pop(name, None)

    layer.register_forward_pre_hook(cover)
    layer.register_forward_hook(uncover, always_call=True)
