# SPDX-License-Identifier: Apache-2.0
"""axolotl: a plugin that trains exactly the modules that a ranking and a budget select.

    plugins: [keylayers.integrations.axolotl.KeylayersPlugin]
    keylayers_ranking: out
    keylayers_budget: 0.3

Works with `adapter: lora` and `qlora`, DoRA too, and without an adapter, where only the selected
weights train. Checked with axolotl 0.19.0 (https://github.com/axolotl-ai-cloud/axolotl), which
calls `register` before it checks a config, `post_model_build` before it adds an adapter, and
`post_trainer_create` when everything is frozen that it freezes.
"""

from collections.abc import MutableMapping
from typing import Any

from axolotl.integrations.base import BasePlugin
from axolotl.utils.logging import get_logger
from pydantic import BaseModel
from transformers import PreTrainedModel, Trainer

from keylayers.apply.trainable import prove_ranks, prove_trainable
from keylayers.commands.options import BudgetOptions
from keylayers.errors import ConfigError
from keylayers.export.axolotl import ADAPTERS, added_to
from keylayers.export.settings import Settings
from keylayers.model.modules import map_modules
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.selection import Selection, check_same_modules

logger = get_logger("axolotl.integrations.keylayers")  # axolotl shows only its own loggers
Config = MutableMapping[str, Any]  # axolotl's own kind gives None for a key that is not there


class KeylayersArgs(BaseModel):
    """The keys that the plugin adds to axolotl's config."""

    keylayers_ranking: str | None = None
    keylayers_budget: float | int | str | None = None


class KeylayersPlugin(BasePlugin):
    """Selects what axolotl trains, and compares it with what is trained."""

    def __init__(self) -> None:
        super().__init__()
        self._ranking: Ranking | None = None
        self._selection: Selection | None = None

    def get_input_args(self) -> str:
        """Where axolotl finds the keys of the plugin."""
        return f"{__name__}.{KeylayersArgs.__name__}"

    def register(self, cfg: Config) -> None:
        """Add what selects the modules to a config, before axolotl checks it."""
        self._ranking = self._selection = None
        if f"{__name__}.{type(self).__name__}" not in (cfg.get("plugins") or ()):
            return  # axolotl keeps the plugins of an earlier config in the same process
        self._ranking, self._selection, found = select_in(cfg)
        for key, value in found.items():
            cfg[key] = value
        logger.info("keylayers selects %s", _described(self._selection))

    def post_model_build(self, cfg: Config, model: PreTrainedModel) -> None:
        """Refuse a model that is not the one that was ranked."""
        if self._ranking is not None:
            towers = self._ranking.made_by.options.given.get("towers", "language")
            sizes = {module.name: module.num_parameters for module in map_modules(model, towers)}
            check_same_modules(self._ranking.modules, sizes)

    def post_trainer_create(self, cfg: Config, trainer: Trainer) -> None:
        """Raise a GuardError unless exactly the selection is trained."""
        if self._selection is not None:
            prove_trainable(trainer.model, self._selection.names)
            if self._selection.ranks is not None:
                prove_ranks(trainer.model, self._selection.ranks)
            logger.info("keylayers trains exactly %s", _described(self._selection))


def select_in(cfg: Config) -> tuple[Ranking, Selection, dict[str, Any]]:
    """The ranking and the selection that a config asks for, and the keys that train it."""
    path, budget = cfg.get("keylayers_ranking"), cfg.get("keylayers_budget")
    for key, value in (("keylayers_ranking", path), ("keylayers_budget", budget)):
        if value is None:
            raise ConfigError(f"the plugin of keylayers needs `{key}`, but it is not in the config")
    adapter = cfg.get("adapter") or None
    if adapter not in ADAPTERS:
        raise ConfigError(
            f"`adapter` must be lora, qlora or left out with a ranking of keylayers, got {adapter}"
        )
    ranking = Ranking.load(str(path))
    wanted = BudgetOptions(ranking=str(path), budget=str(budget)).budget_for(ranking)
    selection, made_by = ranking.select(wanted), ranking.made_by
    base = str(cfg.get("base_model"))
    if base != made_by.model.name:
        logger.warning("the ranking is of %s, and `base_model` is %s", made_by.model.name, base)
    settings = Settings(
        selection, base, ADAPTERS[adapter], made_by.options.lora_rank, made_by.options.lora_alpha
    )
    return ranking, selection, added_to(cfg, settings)


def _described(selection: Selection) -> str:
    """How many modules."""
    parts = "" if selection.num_parts is None else f", {selection.num_parts} rank-one parts"
    return f"{len(selection.modules)} of {selection.num_candidates} modules{parts}"
