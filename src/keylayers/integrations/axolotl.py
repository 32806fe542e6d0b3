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
from keylayers.export.axolotl import Selected, selected_in
from keylayers.model.modules import map_modules
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
        self._selected: Selected | None = None

    def get_input_args(self) -> str:
        """Where axolotl finds the keys of the plugin."""
        return f"{__name__}.{KeylayersArgs.__name__}"

    def register(self, cfg: Config) -> None:
        """Add what selects the modules to a config, before axolotl checks it."""
        self._selected = None
        if f"{__name__}.{type(self).__name__}" not in (cfg.get("plugins") or ()):
            return  # axolotl keeps the plugins of an earlier config in the same process
        self._selected = found = selected_in(cfg)
        for key, value in found.added.items():
            cfg[key] = value
        ranked, base = found.ranking.made_by.model.name, cfg["base_model"]
        if ranked != base:
            logger.warning(f"the ranking of keylayers is of {ranked}, and `base_model` is {base}")
        logger.info(f"keylayers selects {_described(found.selection)}")

    def post_model_build(self, cfg: Config, model: PreTrainedModel) -> None:
        """Refuse a model that is not the one that was ranked."""
        if self._selected is not None:
            ranking = self._selected.ranking
            towers = ranking.made_by.options.given.get("towers", "language")
            sizes = {module.name: module.num_parameters for module in map_modules(model, towers)}
            check_same_modules(ranking.modules, sizes)

    def post_trainer_create(self, cfg: Config, trainer: Trainer) -> None:
        """Raise a GuardError unless exactly the selection is trained."""
        if self._selected is not None:
            selection = self._selected.selection
            prove_trainable(trainer.model, selection.names)
            if selection.ranks is not None:
                prove_ranks(trainer.model, selection.ranks)
            logger.info(f"keylayers trains exactly {_described(selection)}")


def _described(selection: Selection) -> str:
    """How many modules."""
    parts = "" if selection.num_parts is None else f" with {selection.num_parts} rank-one parts"
    return f"{len(selection.modules)} of {selection.num_candidates} modules{parts}"
