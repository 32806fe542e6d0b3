# SPDX-License-Identifier: Apache-2.0
"""A ranking that costs no pass: how much each module's part of every step lowered the loss.

    s_i = Σ_steps -⟨∂L/∂θ_i, Δθ_i⟩

θ_i are the matrices of the adapter on module i, ∂L/∂θ_i is the gradient that the optimiser was
given (after clipping) and Δθ_i the step that it took. To first order the scores sum to the loss
reduction along the path of the training, so their unit is that of the loss.

Cost: a copy of the adapter, and two products with it per step.
Blind to: what a module would have done without the others, like every sum along one path.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerState

from keylayers.environment import environment
from keylayers.errors import RankingError
from keylayers.model.modules import ModuleInfo
from keylayers.model.sharding import is_sharded, own_part
from keylayers.processes import summed
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from keylayers.updates import adapter_updates
from keylayers.updates.adapter import own_parameters

# Key of the sums in the trainer's state, which is part of each checkpoint.
STATE_KEY = "keylayers.StepScores"


class StepScores(TrainerCallback):
    """Sums the scores while any transformers or TRL trainer trains an adapter.

    Attributes:
        num_steps: Steps that were summed.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._modules: list[ModuleInfo] = []
        self._parameters: list[Tensor] = []
        self._owners: list[int] = []  # place of each parameter's module
        self._before: list[Tensor] = []
        self._sums = torch.zeros(0)  # of each parameter
        self._is_sharded = False

    @property
    def scores(self) -> Mapping[str, float]:
        """Module name -> score, in model order; empty if no step was seen."""
        if self.num_steps == 0:
            return {}
        sums = torch.zeros(len(self._modules), dtype=torch.float64)
        sums.index_add_(0, torch.tensor(self._owners), self._sums.double().cpu())
        return {module.name: float(s) for module, s in zip(self._modules, sums, strict=True)}

    def ranking(self) -> Ranking:
        """The modules by their scores, as a ranking like any other.

        Raises:
            RankingError: nothing has been trained yet, or under DeepSpeed, which hides gradients.
        """
        if self.num_steps == 0:
            raise RankingError(
                "a ranking from steps needs a training, but no step was taken whose gradients can "
                "be seen; call trainer.train() first, and without DeepSpeed, which hides them"
            )
        modules = tuple(map(RankedModule.of, self._modules, self.scores.values()))
        made_by = {"environment": environment(), "num_steps": self.num_steps}
        return Ranking(modules, "step-scores", provenance=made_by)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        """Find what is trained and start from zero, or from the sums of the checkpoint."""
        self._modules, self._owners, self._parameters = [], [], []
        for index, update in enumerate(adapter_updates(kw["model"])):
            trained = [each for each in own_parameters(update.layer) if each.requires_grad]
            self._modules.append(update.module)
            self._parameters += trained
            self._owners += [index] * len(trained)
        self._before = [torch.empty_like(own_part(parameter)) for parameter in self._parameters]
        self._is_sharded = is_sharded(kw["model"])
        device = self._parameters[0].device if self._parameters else None
        self.num_steps, self._sums = 0, torch.zeros(len(self._parameters), device=device)
        saved = state.stateful_callbacks.get(STATE_KEY)
        if saved is not None and state.global_step > 0:  # a run that resumes
            self.num_steps = saved["num_steps"]
            self._sums += torch.tensor(saved["sums"], device=device)

    @torch.no_grad()
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Copy the matrices before the step."""
        torch._foreach_copy_(self._before, [own_part(each) for each in self._parameters])

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kw: Any) -> None:
        """Add the step's scores: the matrices have moved, and their gradients are still there."""
        if all(parameter.grad is None for parameter in self._parameters):
            return  # DeepSpeed keeps gradients outside the parameters
        falls = torch.stack([*map(_loss_fall, self._parameters, self._before)])
        if self._is_sharded:
            falls = summed(falls).to(falls.device)
        self._sums += falls
        self.num_steps += 1
        saved = {"num_steps": self.num_steps, "sums": self._sums.tolist()}
        state.stateful_callbacks[STATE_KEY] = saved


def _loss_fall(parameter: Tensor, before: Tensor) -> Tensor:
    """-⟨∂L/∂θ, Δθ⟩ of this process's part of a matrix; 0 without a gradient."""
    if parameter.grad is None:
        return torch.zeros((), device=parameter.device)
    gradient, step = own_part(parameter.grad).flatten(), (before - own_part(parameter)).flatten()
    return torch.dot(gradient.float(), step.float())
