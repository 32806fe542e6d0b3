# SPDX-License-Identifier: Apache-2.0
"""The updates of a PEFT adapter, or an error that says why a gate cannot scale them."""

from peft import PeftConfig, PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from keylayers.errors import ModelError
from keylayers.model.modules import (
    ModuleInfo,
    base_model_of,
    linear_of,
    map_modules,
    outside_module,
)
from keylayers.model.options import Towers
from keylayers.updates.adalora import AdaLoraUpdate, is_adalora
from keylayers.updates.dora import DoraUpdate
from keylayers.updates.embedding import EmbeddingUpdate
from keylayers.updates.experts import ParameterUpdate
from keylayers.updates.gate import AdapterUpdate
from keylayers.updates.lora import LoraUpdate

# PEFT 0.21 compares these keys with names of modules only. It warns of those of experts, which it
# does apply, and of AdaLoRA's, which name parameters.
FALSE_ALARM = "The following (rank|alpha)_pattern keys did not match"
# With these starts PEFT changes the base's weights when it makes or loads the adapter.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def adapter_updates(model: nn.Module) -> list[AdapterUpdate]:
    """All updates of the active adapter: outside the blocks first, then in the blocks' order.

    Refuses several active adapters, and an update that no gate scales exactly.
    """
    if not isinstance(model, PeftModel):
        raise ModelError(
            f"the model must carry a PEFT adapter, got a plain {type(model).__name__}; fine-tune "
            f"it with LoRA, or give the tuned checkpoint as `tuned`"
        )
    if is_adalora(model) and not hasattr(model.base_model, "trainable_adapter_name"):
        raise ModelError(
            "an AdaLoRA adapter must be loaded to be trained, or PEFT cannot compute its loss; "
            "give is_trainable=True to PeftModel.from_pretrained"
        )
    for name in model.active_adapters:
        refuse_changed_base(model.peft_config[name])
    refuse_trained_biases(model)
    layers = tuner_layers(model)
    inside = map_modules(model, towers_of(model))
    known = {info.name for info in inside}
    outside = [outside_module(model, name) for name in layers if name not in known]
    infos = [*outside, *(info for info in inside if info.name in layers)]
    if not infos:
        raise ModelError(
            "the adapter must update at least one linear layer, embedding or stack of experts, but "
            "it updates none"
        )
    return [_update(info, layers[info.name]) for info in infos]


def refuse_changed_base(config: PeftConfig) -> None:
    """Refuse an adapter with which closed gates would not give the base model."""
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise ModelError(
            f"gates must start from the base model, but PEFT changes its weights for this adapter "
            f"(`init_lora_weights` {start!r}); convert it to plain LoRA: save it with PEFT's "
            f"`path_initial_model_for_weight_conversion`"
        )
    if getattr(config, "layer_replication", None):
        raise ModelError(
            "gates must start from the base model, but this adapter repeats its blocks "
            "(`layer_replication`); use the larger model as the base"
        )


def refuse_trained_biases(model: PeftModel) -> None:
    """Refuse PEFT's `bias` option: it trains biases of the base in place, where no gate acts."""
    kinds = {getattr(model.peft_config[name], "bias", "none") for name in model.active_adapters}
    biases = [
        name
        for name, _ in base_model_of(model).named_parameters()
        if name.rpartition(".")[2] == "bias" and "lora_" not in name
    ]
    if kinds != {"none"} and biases:
        raise ModelError(
            f"a gate must scale the whole update, but it cannot scale the {len(biases)} biases of "
            f"the base that are trained in place (`bias` {', '.join(sorted(kinds))}); fine-tune "
            f"with bias='none'"
        )


def always_on(model: nn.Module) -> list[str]:
    """Modules that the adapter replaces (`modules_to_save`): not gated, always active."""
    return [
        name
        for name, module in base_model_of(model).named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    ]


def tuner_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """Module name in the base model -> the PEFT layer around it, in model order.

    PEFT nests one layer in another where an adapter updates several parameters of one module.
    """
    found = {}
    for name, layer in base_model_of(model).named_modules():
        is_trained_tokens = isinstance(layer, TrainableTokensLayer)  # always on, as a whole
        if isinstance(layer, BaseTunerLayer) and not is_trained_tokens:
            own = name.replace(".base_layer", "")
            is_whole = isinstance(linear_of(layer), (nn.Linear, Conv1D, nn.Embedding))
            if isinstance(layer, ParamWrapper) and not is_whole:
                own = f"{own}.{layer.parameter_name}"
            found[own] = layer
    return found


def own_parameters(layer: BaseTunerLayer) -> list[nn.Parameter]:
    """The adapter's own parameters in a layer, without those of the base layer."""
    base = {id(weight) for weight in layer.base_layer.parameters()}
    return [weight for weight in layer.parameters() if id(weight) not in base]


def towers_of(model: nn.Module) -> Towers:
    """`all` if the adapter also updates blocks outside the language model, else `language`."""
    language = {info.name for info in map_modules(model)}
    others = {info.name for info in map_modules(model, "all")} - language
    return "all" if others & tuner_layers(model).keys() else "language"


def _update(info: ModuleInfo, layer: BaseTunerLayer) -> AdapterUpdate:
    if len(layer.active_adapters) != 1:
        raise ModelError(
            f"exactly one adapter must be active, but {info.name} has {layer.active_adapters}; "
            f"choose one with model.set_adapter(name)"
        )
    adapter = layer.active_adapters[0]
    found = _kind(layer, adapter)
    if isinstance(found, str):
        raise ModelError(
            f"a gate must scale the whole update, which it cannot for {info.name}: {found}"
        )
    return found(info, layer, adapter)


def _kind(layer: BaseTunerLayer, adapter: str) -> type[AdapterUpdate] | str:
    """The kind of this layer's update, or why no gate scales the whole of it."""
    name, base = type(layer).__name__, linear_of(layer)
    if not isinstance(layer, LoraLayer):
        return f"a {name} is not a LoRA layer"
    if layer.merged:
        return "it is merged into the base weights; call model.unmerge_adapter() first"
    if layer.lora_bias.get(adapter, False):
        return "`lora_bias=True` adds a bias that a gate on A does not scale"
    is_dora = layer.use_dora.get(adapter, False)
    if isinstance(layer, AdaLoraLayer):
        return AdaLoraUpdate
    if isinstance(layer, ParamWrapper):
        return ParameterUpdate
    if isinstance(base, nn.Embedding):
        return "DoRA on embeddings has no single place to gate" if is_dora else EmbeddingUpdate
    if not isinstance(base, (nn.Linear, Conv1D)):
        return f"a {name} on a {type(base).__name__} merges its weights or is not a matrix product"
    if is_dora:
        return DoraUpdate
    if adapter in layer.lora_variant:
        variant = type(layer.lora_variant[adapter]).__name__
        return f"the variant {variant} of LoRA is not known to be linear in A's output"
    return LoraUpdate
