# SPDX-License-Identifier: Apache-2.0
"""A ranking for nothing: what each module's part of every training step lowered the loss by.

    s_i = Σ_steps -⟨∂L/∂θ_i, Δθ_i⟩

over the matrices θ_i of the adapter on module i, with the gradient that the optimiser was given
(clipped, if it clips) and the step that it took. To first order the scores sum to the loss
reduction along the way of the training, so their unit is that of the loss.

Cost: a copy of the adapter, and two products with it a step; no pass of its own.
Blind to: what a module would have done without the others, as every sum along one way is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from keylayers.environment import environment
from keylayers.errors import RankingError
from keylayers.model.modules import ModuleInfo
from keylayers.model.sharding import is_sharded, own_part
from keylayers.processes import summed
from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking
from keylayers.updates import adapter_updates
from keylayers.updates.adapter import own_parameters

# Where the trainer's state, which each checkpoint holds, keeps the sums.
STATE_KEY = "keylayers.StepScores"


class StepScores(TrainerCallback):
    """Sums the scores while a trainer trains an adapter; any transformers or TRL trainer.

    Attributes:
        num_steps: Steps that were summed.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self._modules: list[ModuleInfo] = []
        self._owners: list[int] = []
        self._parameters: list[Tensor] = []
        self._before: list[Tensor] = []
        self._sums: Tensor | None = None
        self._is_sharded = False

    @property
    def scores(self) -> Mapping[str, float]:
        """Module name -> score, in model order; empty if no step was seen."""
        if self._sums is None or self.num_steps == 0:
            return {}
        sums = torch.zeros(len(self._modules), dtype=torch.float64)
        sums.index_add_(0, torch.tensor(self._owners), self._sums.double().cpu())
        names = (module.name for module in self._modules)
        return dict(zip(names, sums.tolist(), strict=True))

    def ranking(self) -> Ranking:
        """The modules by their scores, to be selected from, saved and compared like any ranking.

        Raises:
            RankingError: nothing has been trained yet, or under DeepSpeed, which hides gradients.
        """
        if self.num_steps == 0:
            raise RankingError(
                "a ranking from steps needs a training, but no step was taken whose gradients can "
                "be seen; call trainer.train() first, and without DeepSpeed, which hides them"
            )
        scores = self.scores
        modules = (RankedModule.of(module, scores[module.name]) for module in self._modules)
        made_by = {"environment": environment(), "num_steps": self.num_steps}
        return Ranking(tuple(modules), "step-scores", provenance=made_by)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Find what is trained, and begin anew.

        Raises:
            ModelError: the model carries no adapter.
        """
        assert model is not None
        self.num_steps = 0
        self._modules, self._owners, self._parameters = [], [], []
        for index, update in enumerate(adapter_updates(model)):
            self._modules.append(update.module)
            for parameter in own_parameters(update.layer):
                if parameter.requires_grad:
                    self._owners.append(index)
                    self._parameters.append(parameter)
        self._before = [torch.empty_like(own_part(one)) for one in self._parameters]
        self._is_sharded = is_sharded(model)
        self._sums = torch.zeros(len(self._parameters), device=_device(self._parameters))
        saved = state.stateful_callbacks.get(STATE_KEY)
        if saved is not None and state.global_step > 0:  # a run that resumes
            self.num_steps = saved["num_steps"]
            self._sums += torch.tensor(saved["sums"], device=self._sums.device)

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the matrices from before the step."""
        torch._foreach_copy_(self._before, [own_part(one) for one in self._parameters])

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The matrices have moved, and their gradients are still there."""
        assert self._sums is not None
        if all(parameter.grad is None for parameter in self._parameters):
            return  # DeepSpeed keeps the gradients in a place of its own
        falls = torch.stack(
            [
                _loss_fall(parameter, before)
                for parameter, before in zip(self._parameters, self._before, strict=True)
            ]
        )
        if self._is_sharded:
            falls = summed(falls).to(falls.device)
        self._sums += falls
        self.num_steps += 1
        state.stateful_callbacks[STATE_KEY] = {
            "num_steps": self.num_steps,
            "sums": self._sums.tolist(),
        }


def _loss_fall(parameter: Tensor, before: Tensor) -> Tensor:
    """-⟨∂L/∂θ, Δθ⟩ of this process's part of a matrix; 0 without a gradient."""
    if parameter.grad is None:
        return torch.zeros((), device=parameter.device)
    gradient, step = own_part(parameter.grad).flatten(), (before - own_part(parameter)).flatten()
    return torch.dot(gradient.float(), step.float())


def _device(parameters: Sequence[Tensor]) -> torch.device | None:
    return parameters[0].device if parameters else None
