# SPDX-License-Identifier: Apache-2.0
"""Let the backward pass stop at the lowest trained module, whatever the libraries switch on.

Below it nothing needs a gradient, and autograd stops there by itself. Gradient checkpointing takes
that away: TRL, PEFT and transformers then make the embeddings' output require a gradient, for a
kind of checkpointing that needs it, and every block is recomputed and passed through backward down
to the first. The losses and gradients of what is trained are the same without.
"""

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ShallowBackward(TrainerCallback):
    """Stops the backward pass at the lowest trained module, under gradient checkpointing too.

    For any transformers or TRL trainer of a selection. Nothing is done where the embeddings are
    trained, or where checkpointing is of the kind that needs gradients of inputs (`use_reentrant`).
    """

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Cut the graph behind the embeddings, after the libraries' own hooks."""
        self.on_train_end(args, state, control)
        options = args.activation_checkpointing_kwargs or {}
        needs_inputs = args.activation_checkpointing and options.get("use_reentrant", False)
        if model is not None and not needs_inputs:
            self._handle = shallow_backward(model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the hook away."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None


def shallow_backward(model: nn.Module) -> RemovableHandle | None:
    """Cut the graph behind the model's embeddings; None where they are trained or there are none.

    Returns:
        The hook, to be removed. It must be the last one on the embeddings.
    """
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is None or any(one.requires_grad for one in embeddings.parameters()):
        return None
    return embeddings.register_forward_hook(_without_graph)


def _without_graph(_: nn.Module, __: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
    return embedded.detach()
