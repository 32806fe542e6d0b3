# SPDX-License-Identifier: Apache-2.0
"""Which weights of a model a config trains, without the model's weights.

LoRA is put on by PEFT itself, on a model without storage, so the answer is what PEFT really does.
"""

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from keylayers.apply.configs import Wanted
from keylayers.errors import ConfigError
from keylayers.model.modules import ModuleInfo, map_modules
from keylayers.ranking.targets import REWRITTEN
from keylayers.updates.adapter import own_parameters, tuner_layers


@dataclass(frozen=True)
class Trained:
    """What a config trains."""

    modules: tuple[ModuleInfo, ...]  # all of the model's blocks, those of towers too
    lora: Mapping[str, int]  # module -> LoRA's rank there
    num_lora_parameters: int
    whole: Mapping[str, int]  # module -> its parameters that are trained themselves
    warnings: tuple[str, ...]  # what the config's author may not expect

    @property
    def num_parameters(self) -> int:
        """Everything that is trained."""
        return self.num_lora_parameters + sum(self.whole.values())

    @property
    def names(self) -> set[str]:
        """All modules of which something is trained."""
        return {*self.lora, *self.whole}


def trained_by(wanted: Wanted, model: PreTrainedModel) -> Trained:
    """What a config trains in a model, which may be on the meta device and is changed."""
    modules, language = map_modules(model, "all"), {info.name for info in map_modules(model)}
    names = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    found, lora, num_lora = list(wanted.notes), dict[str, int](), 0
    if wanted.lora is None:
        found += _unmatched_patterns(wanted, parameters)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted.is_trained(name))
    else:
        with warnings.catch_warnings(record=True) as caught:
            for category in (UserWarning, RuntimeWarning):
                warnings.simplefilter("always", category)
            layers = tuner_layers(_with_lora(wanted, model))
        lora = {name: next(iter(layer.r.values())) for name, layer in layers.items()}
        num_lora = sum(own.numel() for layer in layers.values() for own in own_parameters(layer))
        found += [" ".join(str(warning.message).split()) for warning in caught]
        found += _unmatched_names(wanted.lora, names, parameters, lora)
        if any(info.is_stacked for info in modules):
            known = {info.name for info in modules}
            found += _rewritten(_named(wanted.lora, names, parameters) & known, known & {*lora})
        found += _layers_not_as_asked(wanted.lora, modules, names)
    whole = _whole(model, modules)
    trained = {*lora, *whole}
    if not trained:
        raise ConfigError("the config must train something, but it trains no weight of this model")
    others = trained - language
    hit = [info.name for info in modules if info.name in others]
    found += [f"outside the language model: {_and_more(hit)}"] if hit else []
    return Trained(modules, lora, num_lora, whole, tuple(found))


def _with_lora(wanted: Wanted, model: PreTrainedModel) -> PeftModel:
    """The model with LoRA; starts that are computed from the weights are left out."""
    config = copy.deepcopy(wanted.lora)
    assert config is not None
    if isinstance(config.init_lora_weights, str):  # such as pissa, which needs a decomposition
        config.init_lora_weights = True
    try:
        return get_peft_model(model, config, low_cpu_mem_usage=True)
    except (ValueError, KeyError, NotImplementedError) as error:
        reason = "; ".join((" ".join(str(error).split()), *wanted.notes))
        raise ConfigError(f"PEFT must accept this adapter for the model: {reason}") from error


def _whole(model: nn.Module, modules: Iterable[ModuleInfo]) -> dict[str, int]:
    """Module -> how many of its own parameters, or of copies that replace them, are trained."""
    layers = tuner_layers(model).values()
    own = {id(weight) for layer in layers for weight in own_parameters(layer)}
    stacked = {info.name for info in modules if info.is_stacked}
    found: dict[str, int] = {}
    for full_name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            name = re.split(r"\.(?:modules_to_save|token_adapter)\.", full_name)[0]
            if name == full_name and name not in stacked:
                name = name.rpartition(".")[0]
            found[name] = found.get(name, 0) + parameter.numel()
    return found


def _unmatched_names(
    config: LoraConfig, names: list[str], parameters: list[str], hit: Iterable[str]
) -> list[str]:
    """Entries of the config's lists that no module of the model has, which PEFT passes over."""
    is_mixture = any(name.rpartition(".")[0].endswith("experts") for name in hit)
    found = []
    for key, known in (
        ("target_modules", names),
        ("target_parameters", parameters),
        ("exclude_modules", names),
        ("modules_to_save", names),
    ):
        listed = getattr(config, key, None)
        for entry in sorted(listed) if isinstance(listed, (list, set, tuple)) else ():
            is_rewritten = is_mixture and entry.rpartition(".")[2] in REWRITTEN
            if not any(f".{name}".endswith(f".{entry}") for name in known) and not is_rewritten:
                note = f"`{key}`: {entry!r} matches nothing"
                if re.search(r"[\\*^$(|\[]", entry):
                    note += "; PEFT reads an entry of a list as a name, not as an expression"
                found.append(note)
    return found


def _unmatched_patterns(wanted: Wanted, parameters: list[str]) -> list[str]:
    found = []
    for entry, pattern in wanted.patterns.items():
        if not any(re.match(pattern, name) for name in parameters):
            note = f"`unfrozen_parameters`: {entry!r} matches nothing"
            found.append(note + ("; do not escape dots" if "\\." in entry else ""))
    return found


def _named(config: LoraConfig, names: list[str], parameters: list[str]) -> set[str]:
    """What the config names by itself, before PEFT converts it for a mixture of experts."""
    if config.target_modules in (None, "all-linear"):
        return set()
    targets = tuple(f".{target}" for target in config.target_parameters or ())
    hit = {name.removesuffix(".weight") for name in parameters if f".{name}".endswith(targets)}
    return hit | {name for name in names if check_target_module_exists(config, name)}


def _rewritten(named: set[str], hit: set[str]) -> list[str]:
    """What PEFT trains in a mixture of experts although the config does not name it, and back."""
    return [
        f"PEFT rewrites the targets of this mixture of experts: it {verb} {_and_more(names)}"
        for verb, names in (("adds", sorted(hit - named)), ("leaves out", sorted(named - hit)))
        if names and named
    ]


def _and_more(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _layers_not_as_asked(
    config: LoraConfig, modules: Iterable[ModuleInfo], names: Iterable[str]
) -> Iterator[str]:
    """Where `layers_to_transform` does not mean what it seems to."""
    layers = config.layers_to_transform
    if layers is None:
        return
    wanted = [layers] if isinstance(layers, int) else layers
    num_blocks = len({info.block_index for info in modules})
    if absent := ", ".join(str(layer) for layer in wanted if not 0 <= layer < num_blocks):
        among = f"among the {num_blocks} of the model"
        yield f"`layers_to_transform`: there is no block {absent} {among}"
    if not wanted:
        yield "`layers_to_transform` is empty, which PEFT reads as all blocks"
    elif full := {*(config.target_modules or ())} & {*names}:
        yield f"`layers_to_transform` does not hold for full names such as {min(full)}"
