# SPDX-License-Identifier: Apache-2.0
r"""axolotl: YAML for LoRA, or for a full fine-tune with `unfrozen_parameters`.

Checked with axolotl 0.19.0 (https://github.com/axolotl-ai-cloud/axolotl). It escapes the dots in
`unfrozen_parameters` itself and matches from the start of a name, so `\.` would match nothing and
freeze the whole model. `lora_target_linear` is left out because it would add every linear layer to
the selection. The plugin (`keylayers.integrations.axolotl`) sets the same keys in a config.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keylayers.errors import ConfigError
from keylayers.export.settings import Files, FineTune, Settings, refuse, yaml_text
from keylayers.ranking.budget import Auto, parse_budget
from keylayers.ranking.ranking import Ranking
from keylayers.ranking.selection import Selection
from keylayers.ranking.targets import by_block

ADAPTERS: Mapping[Any, FineTune] = {None: "full", "lora": "lora", "qlora": "lora"}
# Keys with which axolotl trains other weights than those that the selection's own keys name.
TRAIN_OTHERS: Mapping[FineTune, Sequence[str]] = {
    "full": ("lisa_n_layers", "lisa_step_interval", "reward_model", "process_reward_model"),
    "lora": (
        *("lora_target_linear", "lora_modules_to_save", "lora_exclude_modules"),
        *("peft_layers_to_transform", "peft_layers_pattern", "peft_layer_replication"),
        *("peft_trainable_token_indices", "unfrozen_parameters"),
        *("lisa_n_layers", "lisa_step_interval"),
    ),
}


def export(settings: Settings) -> Files:
    """The part of the config that selects what is trained."""
    content: dict[str, Any] = {"base_model": settings.model}
    if settings.fine_tune == "full":
        content |= _trained(settings)
        content["gradient_checkpointing"] = True
        content["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    else:
        content |= {"adapter": "lora", **_trained(settings), "lora_dropout": 0.0}
    return {"axolotl.yaml": yaml_text(content)}


@dataclass(frozen=True)
class Selected:
    """What a config with the plugin's keys selects."""

    ranking: Ranking
    selection: Selection
    added: Mapping[str, Any]  # the keys of axolotl that train it


def selected_in(config: Mapping[str, Any]) -> Selected:
    """The selection that `keylayers_ranking` and `keylayers_budget` in a config ask for.

    Raises:
        ConfigError: one of the two is missing, or the config trains anything else.
        RankingError: the ranking cannot be read, or the budget is auto and it was not verified.
    """
    for key in ("keylayers_ranking", "keylayers_budget"):
        if config.get(key) is None:
            raise ConfigError(f"the plugin of keylayers needs `{key}`, but it is not in the config")
    path, budget = str(config["keylayers_ranking"]), parse_budget(config["keylayers_budget"])
    adapter = config.get("adapter") or None
    if adapter not in ADAPTERS:
        raise ConfigError(
            f"`adapter` must be lora, qlora or left out with a ranking of keylayers, got {adapter}"
        )
    ranking = Ranking.load(path)
    if isinstance(budget, Auto):
        from keylayers.ranking.verification import auto_budget, verification_file  # loads scipy

        budget = auto_budget(ranking, verification_file(path))
    selection, options = ranking.select(budget), ranking.made_by.options
    base, kind = str(config.get("base_model")), ADAPTERS[adapter]
    settings = Settings(selection, base, kind, options.lora_rank, options.lora_alpha)
    return Selected(ranking, selection, added_to(config, settings))


def added_to(config: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The keys with which a config trains exactly the selection.

    LoRA's rank and alpha are those of the config, if it has them and modules are ranked.

    Raises:
        ConfigError: a key of the config contradicts the selection, or trains more.
    """
    for key in TRAIN_OTHERS[settings.fine_tune]:
        if config.get(key):
            raise ConfigError(
                f"`{key}` must be left out with a ranking of keylayers, which says exactly what is "
                f"trained, got {config[key]!r}"
            )
    if settings.fine_tune == "full" and settings.selection.ranks is not None:
        refuse("axolotl", "rank-one parts are for LoRA: set `adapter`")
    found = _trained(settings)
    if settings.fine_tune == "full" and config.get("gradient_checkpointing"):
        # Recomputed blocks whose input is frozen get no gradient otherwise:
        # https://github.com/huggingface/transformers/issues/21381
        found["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if settings.selection.ranks is None:
        found |= {key: config[key] for key in ("lora_r", "lora_alpha") if config.get(key)}
    for key in dict.fromkeys((*found, "lora_target_parameters")):
        # A worker of Ray gets the config in which these keys are set already.
        if config.get(key) not in (None, found.get(key)):
            raise ConfigError(
                f"`{key}` must be left out with a ranking of keylayers, which sets it, got "
                f"{config[key]!r:.100}"
            )
    return found


def _trained(settings: Settings) -> dict[str, Any]:
    """The keys that say which modules are trained, and with which rank."""
    if settings.fine_tune == "full":
        stacked = settings.selection.stacked or ()
        return {"unfrozen_parameters": _unfrozen(settings.names, stacked)}
    found = settings.lora_options("lora_r", "lora_")
    del found["lora_dropout"]
    alphas = [found["lora_alpha"], *found.get("lora_alpha_pattern", {}).values()]
    if odd := [alpha for alpha in alphas if not isinstance(alpha, int)]:
        refuse("axolotl", f"it takes whole numbers as alpha, and the ranks need {odd[0]}")
    targets = settings.selection.lora_targets
    return found | {f"lora_{name}": value for name, value in targets.items() if value}


def _unfrozen(names: Sequence[str], stacked: Collection[str]) -> list[str]:
    """Patterns of the parameters of `names`; names that differ only in their block share one."""
    parameters = [name if name in stacked else f"{name}.(weight|bias)" for name in names]
    patterns = []
    for (prefix, suffix), indices in by_block(parameters).items():
        number = indices[0] if len(indices) == 1 else f"({'|'.join(indices)})"
        patterns.append(f"^{prefix}{number}{suffix}$")
    return patterns
