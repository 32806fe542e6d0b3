# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA updates: `scaling / r · P Λ Q x`, gated on their input.

PEFT stores A, Λ and B as parameters, not modules, so there is nothing to hook. The update is linear
in x and starts with dropout, so a gate in place of the dropout module scales the whole update.
Gates of parts scale Λ: AdaLoRA's own triplets are the parts.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TypeGuard

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor, nn

from keylayers.model.preserve import restored
from keylayers.updates.gate import AdapterUpdate, Gate, PartBasis, PartGate, cover_in_forward


class AdaLoraUpdate(AdapterUpdate):
    """The singular vectors and values of one linear layer."""

    without_examples = ("part",)  # whose gates scale Λ

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """`scaling / r · P Λ Q` in float32."""
        a, values, b = (tensor.float() for tensor in self._triplets())
        return self._scaling() * (b @ (a * values))

    def ranks_left(self) -> int:
        """Number of singular values that AdaLoRA has not set to zero."""
        return int((self.layer.lora_E[self.adapter].detach() != 0).sum())

    def connect(self, gate: Gate) -> None:
        """Put the gate in the place of AdaLoRA's dropout, or scale the singular values."""
        if not isinstance(gate, PartGate):
            self.layer.lora_dropout[self.adapter] = gate
            return
        self.layer.lora_dropout[self.adapter] = nn.Identity()
        _, values, _ = self._triplets()

        def scaled() -> dict[str, Tensor]:
            gates = gate.value().to(values.device, values.dtype)
            return {self.adapter: values * gates[:, None]}

        cover_in_forward(self.layer, "lora_E", scaled)

    @cached_property
    def parts(self) -> PartBasis:
        """AdaLoRA's triplets, in its own order."""
        a, values, b = (tensor.cpu().double() for tensor in self._triplets())
        sizes = values.abs().flatten() * a.norm(dim=1) * b.norm(dim=0)
        identity = torch.eye(len(values), dtype=torch.float64)
        cost = a.shape[1] + b.shape[0]
        return PartBasis(self._scaling() * sizes, (cost,) * len(values), identity, identity)

    def cut(self, kept: Sequence[int]) -> dict[str, Tensor]:
        """A and B of plain LoRA that hold the kept triplets."""
        a, values, b = (tensor.cpu().double() for tensor in self._triplets())
        values = self._scaling() * values[list(kept)]
        root = values.abs().sqrt()
        return {
            "lora_A.weight": root * a[list(kept)],
            "lora_B.weight": b[:, list(kept)] * (root * values.sign()).T,
        }

    def _triplets(self) -> tuple[Tensor, Tensor, Tensor]:
        layer, name = self.layer, self.adapter
        return tuple(part[name].detach() for part in (layer.lora_A, layer.lora_E, layer.lora_B))

    def _scaling(self) -> float:
        ranknum = float(self.layer.ranknum[self.adapter].detach())
        return float(self.layer.scaling[self.adapter] / (ranknum + 1e-5))  # as PEFT divides


def is_adalora(model: nn.Module) -> TypeGuard[PeftModel]:
    """Whether the model carries an AdaLoRA adapter."""
    return isinstance(model, PeftModel) and isinstance(model.base_model, AdaLoraModel)


@contextlib.contextmanager
def without_penalty(model: nn.Module) -> Iterator[None]:
    """Inside the block, AdaLoRA adds no penalty to the model's loss.

    `AdaLoraModel.forward` of PEFT 0.21 adds a penalty for singular vectors that are not orthogonal,
    in evaluation mode too. No gate scales it, and with it the loss would not be in nats.
    """
    configs = list(model.peft_config.values()) if is_adalora(model) else []
    with restored(map(vars, configs)):
        for config in configs:
            config.orth_reg_weight = 0.0
        yield
