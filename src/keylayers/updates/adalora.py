# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA updates: `scaling / r · P Λ Q x`, gated on their input.

PEFT stores A, Λ and B as parameters, not modules, so there is nothing to hook. The update is linear
in x and starts with dropout, so a gate in place of the dropout module scales the whole update.
"""

import contextlib
from collections.abc import Iterator
from typing import TypeGuard

from jaxtyping import Float
from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel
from torch import Tensor, nn

from keylayers.updates.gate import AdapterUpdate, Gate


class AdaLoraUpdate(AdapterUpdate):
    """The singular vectors and values of one linear layer."""

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """`scaling / r · P Λ Q` in float32."""
        a = self.layer.lora_A[self.adapter].detach().float()
        values = self.layer.lora_E[self.adapter].detach().float()
        b = self.layer.lora_B[self.adapter].detach().float()
        ranknum = float(self.layer.ranknum[self.adapter].detach())
        scaling = self.layer.scaling[self.adapter] / (ranknum + 1e-5)  # as PEFT divides
        return scaling * (b @ (a * values))

    def ranks_left(self) -> int:
        """Number of singular values that AdaLoRA has not set to zero."""
        return int((self.layer.lora_E[self.adapter].detach() != 0).sum())

    def connect(self, gate: Gate) -> None:
        """Put the gate in the place of AdaLoRA's dropout."""
        self.layer.lora_dropout[self.adapter] = gate


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
    weights = [config.orth_reg_weight for config in configs]
    for config in configs:
        config.orth_reg_weight = 0.0
    try:
        yield
    finally:
        for config, weight in zip(configs, weights, strict=True):
            config.orth_reg_weight = weight
