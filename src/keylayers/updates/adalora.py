# SPDX-License-Identifier: Apache-2.0
"""AdaLoRA updates: `scaling / r · P Λ Q x`, gated on their input.

PEFT stores A, Λ and B as parameters, not modules, so there is nothing to hook. The update is linear
in x and starts with dropout, so a gate in place of the dropout module scales the whole update.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from jaxtyping import Float
from peft import PeftModel
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer
from torch import Tensor, nn

from keylayers.model.modules import ModuleInfo
from keylayers.updates.gate import Gate


@dataclass(frozen=True)
class AdaLoraUpdate:
    """The singular vectors and values of one linear layer, as PEFT holds them."""

    module: ModuleInfo
    layer: AdaLoraLayer
    adapter: str

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """The whole update of the weight, Δθ, in float32."""
        a = self.layer.lora_A[self.adapter].detach().float()
        values = self.layer.lora_E[self.adapter].detach().float()
        b = self.layer.lora_B[self.adapter].detach().float()
        scaling = self.layer.scaling[self.adapter] / (self._ranknum() + 1e-5)
        return scaling * (b @ (a * values))

    def ranks_left(self) -> int:
        """Number of singular values that AdaLoRA has not set to zero."""
        return int((self.layer.lora_E[self.adapter].detach() != 0).sum())

    def _ranknum(self) -> float:
        return float(self.layer.ranknum[self.adapter].detach())

    @contextlib.contextmanager
    def gated(self, gate: Gate) -> Iterator[None]:
        """Scale this update by `gate` inside the block; AdaLoRA's dropout is off there."""
        dropout = self.layer.lora_dropout[self.adapter]
        self.layer.lora_dropout[self.adapter] = gate
        try:
            yield
        finally:
            self.layer.lora_dropout[self.adapter] = dropout


def is_adalora(model: nn.Module) -> bool:
    """Whether the model carries an AdaLoRA adapter."""
    return isinstance(model, PeftModel) and isinstance(model.base_model, AdaLoraModel)


@contextlib.contextmanager
def without_penalty(model: nn.Module) -> Iterator[None]:
    """Inside the block, AdaLoRA adds no penalty to the model's loss.

    PEFT's `AdaLoraModel.forward` adds a penalty for singular vectors that are not orthogonal, in
    evaluation mode too. No gate scales it, and with it the loss would not be in nats.
    """
    if not is_adalora(model):
        yield
        return
    assert isinstance(model, PeftModel)
    weights = {name: config.orth_reg_weight for name, config in model.peft_config.items()}
    for config in model.peft_config.values():
        config.orth_reg_weight = 0.0
    try:
        yield
    finally:
        for name, weight in weights.items():
            model.peft_config[name].orth_reg_weight = weight
