# SPDX-License-Identifier: Apache-2.0
"""Methods that score modules: one plain function each, one explicit table of them.

Every function takes a trainer, the updates of its model, options and a function to report steps to,
and gives a score for each update's module; higher is more important.
"""

from collections.abc import Sequence

from transformers import Trainer

from keylayers.errors import ConfigError
from keylayers.options import MaskOptions, Method
from keylayers.options.passes import STOPS_BY_ITSELF
from keylayers.progress import OnStep
from keylayers.scores.adalora import adalora
from keylayers.scores.aletheia import aletheia
from keylayers.scores.block_influence import block_influence
from keylayers.scores.cka import cka
from keylayers.scores.depth import first, last, middle
from keylayers.scores.elimination import elimination
from keylayers.scores.eva import eva
from keylayers.scores.fisher import fisher
from keylayers.scores.gradient_norm import gradient_norm
from keylayers.scores.ila import ila
from keylayers.scores.kappatune import kappatune
from keylayers.scores.leave_one_out import leave_one_out
from keylayers.scores.lora_drop import lora_drop
from keylayers.scores.module_scores import ModuleScores
from keylayers.scores.path import path
from keylayers.scores.plop import plop
from keylayers.scores.price import price
from keylayers.scores.random_order import random_order
from keylayers.scores.repeated import ScoreFunction, repeated
from keylayers.scores.shapley import shapley
from keylayers.scores.spectrum import spectrum
from keylayers.scores.update_norm import update_norm
from keylayers.trainers.log import TrainerLog
from keylayers.trainers.loss import samples
from keylayers.updates import Update

METHODS: dict[Method, ScoreFunction] = {
    "elimination": elimination,
    "path": path,
    "price": price,
    "ila": ila,
    "leave-one-out": leave_one_out,
    "shapley": shapley,
    "update-norm": update_norm,
    "gradient-norm": gradient_norm,
    "fisher": fisher,
    "aletheia": aletheia,
    "adalora": adalora,
    "lora-drop": lora_drop,
    "eva": eva,
    "plop": plop,
    "spectrum": spectrum,
    "kappatune": kappatune,
    "block-influence": block_influence,
    "cka": cka,
    "first": first,
    "last": last,
    "middle": middle,
    "random": random_order,
}

# For a trainer that samples its data: the gradient of its loss means something, its value does not,
# and its batches hold no tokens to look at.
FOR_SAMPLED_DATA: tuple[Method, ...] = (
    "elimination",
    "path",
    "price",
    "ila",
    "gradient-norm",
    "fisher",
    "aletheia",
    "update-norm",
    "spectrum",
    "kappatune",
    "first",
    "last",
    "middle",
    "random",
)


def score_modules(
    trainer: Trainer,
    updates: Sequence[Update],
    options: MaskOptions,
    on_step: OnStep | None = None,
) -> ModuleScores:
    """Scores by the method that `options` names, repeated if they ask for a stable selection.

    The trainer's own loggers (`report_to`) are told of losses and scores as they come.

    Args:
        trainer: Any transformers or TRL trainer; its model carries the updates.
        updates: From `adapter_updates` or `dense_updates` on that model.
        options: Which method, and how.
        on_step: Called after each pass with its number, from 1, and its loss in nats.

    Raises:
        ConfigError: the method needs a loss that is a function of the data, and the trainer samples
            its own.
        LossError: the loss became NaN or infinite.
        GuardError: something else than the gates changed, or a gate took no part.
    """
    if samples(trainer) and options.method not in FOR_SAMPLED_DATA:
        raise ConfigError(
            f"`method` {options.method} needs a loss that is a function of the data, but "
            f"{type(trainer).__name__} samples completions anew for each mask; choose elimination, "
            f"path, ila or price, which use only its gradient"
        )
    method = METHODS[options.method]
    if options.method in STOPS_BY_ITSELF:  # they tell the loggers of every step
        return method(trainer, updates, options, on_step)
    log = TrainerLog(trainer)
    on_step = log.losses(on_step)
    if options.until_stable is None:
        found = method(trainer, updates, options, on_step)
    else:
        found = repeated(method, trainer, updates, options, on_step)
    log.modules(len(found.losses), dict(zip(found.module_names, found.scores, strict=True)))
    return found
