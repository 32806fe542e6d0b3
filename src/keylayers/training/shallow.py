# SPDX-License-Identifier: Apache-2.0
"""Let the backward pass stop at the lowest trained module, whatever the libraries switch on.

Autograd stops there by itself. Under gradient checkpointing TRL 1.16, PEFT and transformers 5.23
make the embeddings' output require a gradient, which only reentrant checkpointing needs: every
block down to the first is recomputed and passed through backward, for the same gradients.
"""

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainingArguments


class ShallowBackward(TrainerCallback):
    """Stops the backward pass at the lowest trained module, under gradient checkpointing too.

    For any transformers or TRL trainer of a selection. It does nothing where the embeddings are
    trained, or where checkpointing needs gradients of inputs (`use_reentrant`).
    """

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kw: Any) -> None:
        """Cut the graph behind the embeddings, after the libraries' own hooks."""
        self.on_train_end(args, state, control)
        options = args.activation_checkpointing_kwargs or {}
        if not (args.activation_checkpointing and options.get("use_reentrant", False)):
            self._handle = shallow_backward(kw["model"])

    def on_train_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        """Remove the hook."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None


def shallow_backward(model: nn.Module) -> RemovableHandle | None:
    """Cut the graph behind the model's embeddings, unless trained; the hook must be their last."""
    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is None or any(weight.requires_grad for weight in embeddings.parameters()):
        return None
    return embeddings.register_forward_hook(lambda _, __, embedded: embedded.detach())
