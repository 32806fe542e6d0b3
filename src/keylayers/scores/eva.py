# SPDX-License-Identifier: Apache-2.0
"""EVA: the LoRA rank that a module earns by the variance of its inputs.

    Singular values of each module's inputs, as shares of its own variance; the largest of all
    modules get the ranks.                                                     s_i = ranks of i

Source: Paischer, Hauzenberger, Schmied, Alkin, Deisenroth, Hochreiter: "Parameter Efficient
    Fine-tuning via Explained Variance Adaptation", NeurIPS 2025, arXiv:2410.07170; PEFT's
    implementation (`get_eva_state_dict`) does the work.
Differs: ranks are redistributed with ρ = 4 from 4 a module, as a ranking needs zeros. Modules with
    the same inputs (q, k, v; gate, up) have the same score.
Cost: forward passes of the base model over `mask_batches` batches, repeated until the components
    converge, with incremental singular value decompositions.
Blind to: the loss, the update and the outputs; inputs with a simple structure win.
"""

import contextlib
import inspect
import io
from collections.abc import Mapping, Sequence
from typing import Any

from peft import EvaConfig, LoraConfig
from peft.tuners.lora.eva import get_eva_state_dict
from torch import nn

from keylayers.errors import ConfigError
from keylayers.model.modules import base_model_of
from keylayers.scores.options import Batched
from keylayers.scores.probe import linear_layers
from keylayers.scores.task import ModuleScores, Task

MEAN_RANK = 4
RHO = 4.0


def eva(task: Task, options: Batched) -> ModuleScores:
    """The rank that EVA gives each update's module."""
    linear_layers(task)
    trainer = task.trainer
    taken = inspect.signature(base_model_of(trainer.model).forward).parameters
    num_passes = 0

    def forward(model: nn.Module, inputs: Mapping[str, Any]) -> None:
        nonlocal num_passes
        num_passes += 1
        model(**{name: value for name, value in inputs.items() if name in taken})

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=MEAN_RANK,
        target_modules=list(task.module_names),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=RHO),
    )
    with task.masked(options.mask_batches, looks_inside=True) as masked:
        batches = [trainer._prepare_inputs(dict(batch)) for batch in masked.batches]
        _check_batches(batches, type(trainer).__name__)
        # PEFT prints a line for every short batch.
        with contextlib.redirect_stdout(io.StringIO()):
            components = get_eva_state_dict(
                trainer.model,
                batches,
                config,
                forward_fn=forward,
                gather_distributed_inputs=False,
                show_progress_bar=False,
            )
    ranks = {name.removeprefix("base_model.model."): len(rows) for name, rows in components.items()}
    scores = [float(ranks[name]) for name in task.module_names]
    return task.result(scores, unit="ranks", num_forward=num_passes)


def _check_batches(batches: Sequence[Mapping[str, Any]], trainer: str) -> None:
    """Refuse batches without tokens, or with too few: PEFT 0.21 skips those and loops forever."""
    if "input_ids" not in batches[0]:
        raise ConfigError(
            f"`method` eva needs batches with `input_ids`, but those of {trainer} have "
            f"{', '.join(batches[0])}; choose elimination"
        )
    needed = int(MEAN_RANK * RHO)
    lengths = [int((batch["labels"] != -100).sum()) for batch in batches if "labels" in batch]
    longest = max(lengths, default=needed)
    if longest < needed:
        raise ConfigError(
            f"`method` eva needs batches of at least {needed} labelled tokens, but the longest has "
            f"{longest}; raise `batch_size`"
        )
