# SPDX-License-Identifier: Apache-2.0
"""Dense updates of stacked experts: `Δθ = θ_t - θ_0` of a mixture's parameter."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from keylayers.model.modules import ModuleInfo
from keylayers.updates.checkpoints import difference_of
from keylayers.updates.gate import GATE_CHILD, Gate


@dataclass(frozen=True)
class DenseExpertsUpdate:
    """What full fine-tuning added to one parameter that stacks the experts of a mixture.

    Architectures use the parameter in different ways, so the mixed weight replaces it during the
    forward pass. Autograd keeps the mixed weight: a second copy of the experts in memory.
    """

    module: ModuleInfo
    layer: nn.Module
    tuned: Mapping[str, Tensor]

    def delta(self) -> Float[Tensor, "..."]:
        """The whole update of the parameter, Δθ, in its own shape, in float32."""
        return self._delta().float()

    @contextlib.contextmanager
    def gated(self, gate: Gate) -> Iterator[None]:
        """Let the experts, which hold θ_0, compute with `θ_0 + γ Δθ` inside the block."""
        name = self.module.name.rpartition(".")[2]

        def mix(*_: Any) -> None:
            parameter = self.layer.get_parameter(name)
            self.layer.__dict__[name] = parameter + gate(self._delta())

        def restore(*_: Any) -> None:
            self.layer.__dict__.pop(name, None)  # uncovers the parameter

        child = f"{GATE_CHILD}_{name}"  # one layer holds several stacks of experts
        self.layer.add_module(child, gate)
        handles = [
            self.layer.register_forward_pre_hook(mix),
            self.layer.register_forward_hook(restore, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            restore()
            delattr(self.layer, child)

    def _delta(self) -> Tensor:
        parameter = self.layer.get_parameter(self.module.name.rpartition(".")[2])
        return difference_of(self.tuned, self.module.name, parameter)
