# SPDX-License-Identifier: Apache-2.0
"""EVA: the LoRA rank that the variance of a module's inputs earns it.

    Singular values of each module's inputs, as shares of its own variance; the largest of all
    modules get the ranks.                                                     s_i = ranks of i

Source: Paischer, Hauzenberger, Schmied, Alkin, Deisenroth, Hochreiter: "Parameter Efficient
    Fine-tuning via Explained Variance Adaptation", NeurIPS 2025, arXiv:2410.07170; PEFT's
    implementation (`get_eva_state_dict`) does the work.
Differs: ranks are redistributed with ρ = 4 from 4 a module, as a ranking needs zeros. Modules with
    the same inputs (q, k, v; gate, up) have the same score.
Cost: forward passes of the base model over `mask_batches` batches, again and again until the
    components converge, with incremental singular value decompositions.
Blind to: the loss, the update and the outputs; inputs of a simple structure win.
"""

import contextlib
import inspect
import io
import time
from collections.abc import Mapping, Sequence
from typing import Any

from peft import EvaConfig, LoraConfig
from peft.tuners.lora.eva import get_eva_state_dict
from torch import nn
from transformers import Trainer

from keylayers.errors import ConfigError
from keylayers.model.modules import base_model_of
from keylayers.options import MaskOptions
from keylayers.progress import OnStep
from keylayers.scores.module_scores import ModuleScores
from keylayers.scores.scoring import scoring
from keylayers.updates import Update
from keylayers.updates.base_weight import check_linear

MEAN_RANK = 4
RHO = 4.0


def eva(
    trainer: Trainer,
    updates: Sequence[Update],
    options: MaskOptions,
    on_step: OnStep | None = None,
) -> ModuleScores:
    """The rank that EVA gives each update's module."""
    start = time.perf_counter()
    for update in updates:
        check_linear(update.layer)
    names = [update.module.name for update in updates]
    num_passes = 0

    def forward(model: nn.Module, inputs: Mapping[str, Any]) -> None:
        nonlocal num_passes
        num_passes += 1
        model(**{name: value for name, value in inputs.items() if name in taken})

    with scoring(trainer, updates, options, on_step, looks_inside=True) as task:
        taken = inspect.signature(base_model_of(trainer.model).forward).parameters
        batches = [trainer._prepare_inputs(dict(batch)) for batch in task.batches]
        if "input_ids" not in batches[0]:
            raise ConfigError(
                f"`method` eva needs batches with `input_ids`, but those of "
                f"{type(trainer).__name__} have {', '.join(batches[0])}; choose elimination"
            )
        _check_long_enough(batches)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=MEAN_RANK,
            target_modules=names,
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=RHO),
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints when a batch is short
            components = get_eva_state_dict(
                trainer.model,
                batches,
                config,
                forward_fn=forward,
                gather_distributed_inputs=False,
                show_progress_bar=False,
            )
    ranks = {name.removeprefix("base_model.model."): len(rows) for name, rows in components.items()}
    return ModuleScores(
        module_names=tuple(names),
        scores=tuple(float(ranks[name]) for name in names),
        standard_errors=None,
        unit="ranks",
        losses=(),
        seconds=time.perf_counter() - start,
        num_forward=num_passes,
    )


def _check_long_enough(batches: Sequence[Mapping[str, Any]]) -> None:
    """Refuse batches of too few labelled tokens: PEFT skips them and looks on for ever.

    Raises:
        ConfigError: no batch has as many as the components that are asked for.
    """
    needed = int(MEAN_RANK * RHO)
    lengths = (int((one["labels"] != -100).sum()) for one in batches if "labels" in one)
    longest = max(lengths, default=needed)
    if longest < needed:
        raise ConfigError(
            f"eva needs batches of at least {needed} labelled tokens, but the longest has "
            f"{longest}; raise `batch_size`"
        )
