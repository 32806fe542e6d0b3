# SPDX-License-Identifier: Apache-2.0
"""Load models, tokenizers and adapters from a folder or the hub.

Only safetensors are read, never pickle; code that comes with a model runs only with
`trust_remote_code`.
"""

import re
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_bitsandbytes_available

from keylayers.errors import ModelError
from keylayers.model.checkpoint import ADAPTER_FILES, check_folder, local_folder, required
from keylayers.model.options import Dtype, ModelOptions, Objective
from keylayers.updates.adapter import FALSE_ALARM, refuse_changed_base, refuse_trained_biases

KINDS = {"reward": AutoModelForSequenceClassification}  # by objective; else a causal model
MUST = "be a causal language model"
# What PEFT and safetensors raise for configs and weights with wrong values; found by fuzzing.
BAD_ADAPTER = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(AssertionError, ImportError, re.error, SafetensorError),
)


def _torch_dtype(dtype: Dtype) -> torch.dtype:
    if dtype == "auto":
        return torch.bfloat16 if torch.accelerator.is_available() else torch.float32
    return getattr(torch, dtype)


def _from_pretrained(kind: Any, source: ModelOptions, must: str, **options: Any) -> Any:
    """What a class of transformers loads from `source`, or an error that says what it must be."""
    check_folder(source.model, "config.json", "a model")
    options |= {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    with required(f"{source.model!r} must {must}"):
        return kind.from_pretrained(source.model, **options)


def load_model(source: ModelOptions, objective: Objective = "sft") -> PreTrainedModel:
    """The model at `source`, on the CPU: a causal one, or for `reward` one with a scalar head.

    A head that the checkpoint lacks is initialised from a fixed seed.
    """
    is_reward = objective == "reward"
    kind = KINDS.get(objective, AutoModelForCausalLM)
    more = _quantisation(source) | ({"num_labels": 1} if is_reward else {})
    more |= {"dtype": _torch_dtype(source.dtype), "use_safetensors": True}
    model, info = _from_pretrained(kind, source, MUST, output_loading_info=True, **more)
    missing = sorted(info["missing_keys"])
    if is_reward:
        body = f"{model.base_model_prefix}."
        generator = torch.Generator().manual_seed(0)  # whatever the run's seed
        for name in [name for name in missing if not name.startswith(body)]:
            weight = model.get_parameter(name)
            drawn = torch.randn(weight.shape, generator=generator)
            weight.data.copy_(drawn * model.config.initializer_range)
        missing = [name for name in missing if name.startswith(body)]
    if missing:
        raise ModelError(
            f"the checkpoint must hold every weight, but {source.model!r} lacks {len(missing)}, "
            f"first {missing[0]}"
        )
    return model


def _quantisation(source: ModelOptions) -> dict[str, Any]:
    """What loads the base in 4 bits as QLoRA does (Dettmers et al. 2023, arXiv:2305.14314)."""
    if not source.load_in_4bit:
        return {}
    if not is_bitsandbytes_available():
        raise ModelError(
            "`load_in_4bit` needs bitsandbytes, which is not installed; "
            "`pip install 'keylayers[qlora]'`"
        )
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=_torch_dtype(source.dtype),
    )
    return {"quantization_config": config}


def load_tokenizer(source: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer at `source`, with a padding token (by default the end token)."""
    tokenizer = _from_pretrained(AutoTokenizer, source, "hold a tokenizer")
    if tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer must have an end token, but that of {source.model!r} has none"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokens(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, highest: int
) -> None:
    """Refuse tokens without a row of embeddings; `highest` is the highest id that data have."""
    num_rows = model.get_input_embeddings().num_embeddings
    if highest >= num_rows:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise ModelError(
            f"every token must have a row of the model's embeddings, but {token!r} has id "
            f"{highest} and the model {num_rows} rows; take the model's own tokenizer and chat "
            f"template, or resize the model's embeddings and save it"
        )


def load_adapter(model: PreTrainedModel, adapter: str) -> PeftModel:
    """`model` with the PEFT adapter at `adapter`, all frozen."""
    check_folder(adapter, "adapter_config.json", "a PEFT adapter")
    folder = local_folder(adapter, ADAPTER_FILES, "a PEFT adapter")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"the adapter {adapter!r} must hold adapter_model.safetensors, but does not; pickled "
            f"weights are not loaded"
        )
    with required(f"the adapter {adapter!r} must have a config that PEFT takes", BAD_ADAPTER):
        config = PeftConfig.from_pretrained(str(folder))
    refuse_changed_base(config)
    must = f"the adapter must be one for this base model, but {adapter!r}"
    with required(f"{must} does not fit", BAD_ADAPTER), warnings.catch_warnings():
        # AdaLoRA's model cannot compute a loss unless it was loaded to be trained.
        is_trainable = config.peft_type == PeftType.ADALORA
        if is_trainable or getattr(config, "target_parameters", None):
            warnings.filterwarnings("ignore", FALSE_ALARM, RuntimeWarning)
        tuned = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
        tuned.requires_grad_(False)
        odd = _differing_weights(tuned, folder)
    refuse_trained_biases(tuned)
    if odd:
        raise ModelError(f"{must} and the model differ in {len(odd)} weights, first {odd[0]}")
    return tuned


def _differing_weights(tuned: PeftModel, folder: Path) -> list[str]:
    """Names that are in the adapter's file or in the model, but not in both."""
    if tuned.peft_config["default"].peft_type == PeftType.LORA:
        # Only this call gives the names as PEFT converts them: transformers 5 stacks experts that
        # transformers 4 kept apart.
        loaded = tuned.load_adapter(str(folder), "default")
        return sorted({*loaded.missing_keys, *loaded.unexpected_keys})
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        return sorted({*file.keys()} ^ set(get_peft_model_state_dict(tuned)))


def empty_model(
    source: ModelOptions, objective: Objective = "sft", *, is_as_saved: bool = False
) -> PreTrainedModel:
    """The model on the meta device, by its config; `is_as_saved` takes the checkpoint's class."""
    config = _from_pretrained(AutoConfig, source, "be a model with a config")
    name = (config.architectures or [""])[0] if is_as_saved else ""
    with torch.device("meta"), required(f"{source.model!r} must {MUST}"):
        if hasattr(transformers, name):  # for example one with a vision tower
            return getattr(transformers, name)._from_config(config)
        kind = KINDS.get(objective, AutoModelForCausalLM)
        return kind.from_config(config, trust_remote_code=source.trust_remote_code)


def max_positions(model: PreTrainedModel | PeftModel) -> int | None:
    """The longest sequence that the model takes, in tokens, if its config says so."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def describe(source: ModelOptions, model: PreTrainedModel) -> dict[str, Any]:
    """What a record says of a model: name, revision, kind, size of the output layer, dtype."""
    head = model.get_output_embeddings()
    return {
        "name": source.model,
        "revision": source.revision,
        "commit": getattr(model.config, "_commit_hash", None),
        "model_type": model.config.model_type,
        "num_head_parameters": 0 if head is None else head.weight.numel(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "trust_remote_code": source.trust_remote_code,
    }
