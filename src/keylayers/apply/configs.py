# SPDX-License-Identifier: Apache-2.0
"""What a trainer's config asks for: PEFT, or the YAML of TRL, axolotl or LLaMA-Factory.

Each reader does what the tool's own code does with a model: TRL 1.16 through its own functions,
axolotl 0.18.0 (067b021) and LLaMA-Factory 0.9.6.dev0 (ff6d4d12) by their rules.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from peft import AdaLoraConfig, LoraConfig
from torch import nn
from transformers import PreTrainedModel

from keylayers.errors import ConfigError
from keylayers.export.axolotl import selected_in
from keylayers.model.modules import map_modules

Tool = Literal["peft", "trl", "axolotl", "llamafactory"]
Content = Mapping[str, Any]
KNOWN_BY: dict[Tool, tuple[str, ...]] = {  # keys that only this tool's configs have
    "llamafactory": ("finetuning_type", "lora_target", "lora_rank", "freeze_trainable_layers"),
    "axolotl": ("base_model", "adapter", "lora_target_linear", "unfrozen_parameters"),
    "trl": ("use_peft", "lora_task_type", "lora_modules_to_save"),
    "peft": ("peft_type", "target_modules", "target_parameters"),
}
MODEL_KEY: dict[Tool, str] = {
    "llamafactory": "model_name_or_path",
    "axolotl": "base_model",
    "trl": "model_name_or_path",
    "peft": "base_model_name_or_path",
}
AXOLOTL = {  # its keys -> fields of LoraConfig
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_parameters": "target_parameters",
    "lora_exclude_modules": "exclude_modules",
    "lora_modules_to_save": "modules_to_save",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
    "peft_layer_replication": "layer_replication",
    "peft_trainable_token_indices": "trainable_token_indices",
    "peft_use_dora": "use_dora",
    "peft_use_rslora": "use_rslora",
}
# Parts of names that axolotl's `freeze_mm_modules` freezes
TOWERS = (
    *("vision_tower", "vision_model", "vision_encoder", "embed_vision", "multi_modal_projector"),
    *("visual", "audio_tower", "audio_model", "embed_audio"),
)


@dataclass(frozen=True)
class Wanted:
    """What a config asks for in one model."""

    lora: LoraConfig | None = None  # what PEFT gets; None for a full fine-tune
    is_trained: Callable[[str], bool] = lambda name: True  # of a full fine-tune, by parameter
    # Entry of the config -> the expression that the tool matches with the start of a parameter
    patterns: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what the user should know about the config itself


def tool_of(content: Content) -> Tool:
    """The tool whose config this is, by the keys that only its configs have."""
    found = [tool for tool, keys in KNOWN_BY.items() if any(key in content for key in keys)]
    if len(found) != 1:
        came = " and ".join(found) or ", ".join(map(str, content)) or "none"
        raise ConfigError(
            f"the config must have keys of one tool ({', '.join(get_args(Tool))}), but has those "
            f"of {came:.200}; say which it is with `tool`"
        )
    return found[0]


def wanted(tool: Tool, content: Content, model: PreTrainedModel) -> Wanted:
    """What a tool's config asks for in a model; a ConfigError if the tool would refuse it."""
    readers = {"peft": _peft, "trl": _trl, "axolotl": _axolotl, "llamafactory": _llamafactory}
    try:
        return readers[tool](content, model)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{tool} must accept the config, but refuses it: {reason}") from error


def _peft(content: Content, model: PreTrainedModel) -> Wanted:
    kind = str(content.get("peft_type", "LORA")).rpartition(".")[2]
    if kind not in ("LORA", "ADALORA"):
        raise ConfigError(f"the adapter must be LORA or ADALORA, got {kind}")
    own = AdaLoraConfig if kind == "ADALORA" else LoraConfig
    known = {option.name for option in fields(own)}
    unknown = ", ".join(str(key) for key in content if key not in known)
    given = {key: value for key, value in content.items() if key in known - {"peft_type"}}
    if kind == "ADALORA":
        given.setdefault("total_step", 1_000)
    return Wanted(own(**given), notes=(f"this PEFT ignores {unknown}",) if unknown else ())


def _trl(content: Content, model: PreTrainedModel) -> Wanted:
    from trl import ModelConfig, get_peft_config

    known = {option.name for option in fields(ModelConfig)}
    given = ModelConfig(**{key: value for key, value in content.items() if key in known})
    config = get_peft_config(given)
    targets = content.get("lora_target_modules")
    notes: tuple[str, ...] = ()
    if isinstance(targets, list) and len(targets) == 1:
        notes = ("TRL reads a list of one name as a regular expression over whole names",)
    if config is None and any(key.startswith("lora_") for key in content):
        notes += ("without `use_peft: true` TRL ignores every lora_ key and trains all weights",)
    return Wanted(config, notes=notes)


def _axolotl(content: Content, model: PreTrainedModel) -> Wanted:
    if content.get("keylayers_ranking") is not None:  # keylayers' own plugin adds keys
        content = {**content, **selected_in(content).added}
    towers = TOWERS if content.get("freeze_mm_modules") else ()
    patterns = content.get("unfrozen_parameters") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # axolotl escapes dots itself, and a range of rows such as `[:32000]` is no part of the name
    matched = {
        pattern: re.sub(r"\.(?!\+)", r"\\.", re.sub(r"\[\d*(?::\d*)?\]$", "", pattern))
        for pattern in patterns
    }
    if content.get("adapter") not in ("lora", "qlora"):
        return Wanted(
            is_trained=lambda name: (
                (not matched or any(re.match(regex, name) for regex in matched.values()))
                and not set(towers) & set(name.split("."))
            ),
            patterns=matched,
        )
    notes = ("axolotl freezes LoRA's own matrices as well: leave `unfrozen_parameters` out",)
    targets = content.get("lora_target_modules") or []
    if content.get("lora_target_linear"):
        targets = targets if isinstance(targets, list) else [targets]
        targets = sorted({*targets, *_linear_names(model)})
    given = {name: content[key] for key, name in AXOLOTL.items() if content.get(key) is not None}
    config = LoraConfig(task_type="CAUSAL_LM", **given | {"target_modules": targets})
    return Wanted(config, notes=notes if patterns else ())


def _llamafactory(content: Content, model: PreTrainedModel) -> Wanted:
    kind = content.get("finetuning_type", "lora")
    if kind not in ("lora", "freeze", "full"):
        raise ConfigError(f"`finetuning_type` must be lora, freeze or full, got {kind!r}")
    is_kept = _not_frozen_towers(content, model)
    if kind == "full":
        return Wanted(is_trained=is_kept)
    if kind == "freeze":
        parts = _unfrozen_blocks(content, model)
        return Wanted(is_trained=lambda name: any(part in name for part in parts) and is_kept(name))
    targets = _split(content.get("lora_target", "all"))
    if targets == ["all"]:
        targets = [name for name in _linear_names(model) if name != "lm_head"]
    if _has_towers(model):  # LLaMA-Factory lists what contains a target, towers and projector apart
        names = (name for name, _ in model.named_modules())
        targets = [
            name for name in names if is_kept(name) and any(target in name for target in targets)
        ]
    rank = content.get("lora_rank", 8)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=content.get("lora_alpha") or 2 * rank,
        lora_dropout=content.get("lora_dropout", 0.0),
        target_modules=targets,
        use_dora=content.get("use_dora", False),
        use_rslora=content.get("use_rslora", False),
        modules_to_save=_split(content.get("additional_target")) or None,
    )
    return Wanted(config)


def _unfrozen_blocks(content: Content, model: PreTrainedModel) -> list[str]:
    """What the names of LLaMA-Factory's unfrozen parameters contain: the last or first n blocks."""
    num_blocks = model.config.get_text_config().num_hidden_layers
    count = content.get("freeze_trainable_layers", 2)
    blocks = range(max(0, num_blocks - count), num_blocks)
    if content.get("use_llama_pro"):
        stride = num_blocks // count
        blocks = range(stride - 1, num_blocks + stride - 1, stride)
    elif count <= 0:
        blocks = range(min(-count, num_blocks))
    parts = _split(content.get("freeze_trainable_modules", "all"))
    found = [f".{block}.{'' if part == 'all' else part}" for part in parts for block in blocks]
    return found + _split(content.get("freeze_extra_modules"))


def _not_frozen_towers(content: Content, model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether LLaMA-Factory leaves a name trainable: by default not towers and projector."""
    # It lists names for each model type; we take whatever lies outside the language model.
    if not _has_towers(model) or not content.get("freeze_vision_tower", True):
        return lambda name: True
    language = {info.stack.rpartition(".")[0] for info in map_modules(model)}
    return lambda name: name.startswith(("lm_head", *language))


def _has_towers(model: PreTrainedModel) -> bool:
    return len(map_modules(model, "all")) > len(map_modules(model))


def _linear_names(model: PreTrainedModel) -> list[str]:
    """Last names of all linear layers but the head, in model order."""
    head, modules = model.get_output_embeddings(), model.named_modules()
    linear = [name for name, own in modules if isinstance(own, nn.Linear) and own is not head]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linear))


def _split(value: Any) -> list[str]:
    """LLaMA-Factory takes lists, and texts with commas."""
    if value is None:
        return []
    parts = value.split(",") if isinstance(value, str) else value
    return [str(part).strip() for part in parts]
