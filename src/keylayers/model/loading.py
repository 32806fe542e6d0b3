# SPDX-License-Identifier: Apache-2.0
"""Load models, tokenizers, adapters and checkpoints from a folder or the hub.

Only safetensors are read, never pickle; code that comes with a model runs only with
`trust_remote_code`.
"""

import contextlib
import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_bitsandbytes_available, logging
from transformers.utils.hub import cached_file

from keylayers.errors import ModelError
from keylayers.model.options import Dtype, ModelOptions, Objective

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# What PEFT and safetensors raise for configs and weights with wrong values; found by fuzzing.
FROM_A_BAD_ADAPTER = (
    *(OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError),
    *(AssertionError, ImportError, re.error, SafetensorError),
)
CONFIG_FILES = ("config.json", "generation_config.json", "*.py")  # what stands beside weights
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    "additional_chat_templates/*",
)
STORED_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """The dtype that weights are loaded in."""
    if dtype == "auto":
        return torch.bfloat16 if torch.accelerator.is_available() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]


def load_model(source: ModelOptions, objective: Objective = "sft") -> PreTrainedModel:
    """The model at `source`, on the CPU; trainers move it.

    A causal language model, or for `reward` one with a head that gives a single number. A head that
    the checkpoint lacks is drawn, the same each time.

    Raises:
        ModelError: there is none, it needs code that is not trusted, or weights are missing.
    """
    check_folder(source.model, "config.json", "a model")
    is_reward = objective == "reward"
    kind = AutoModelForSequenceClassification if is_reward else AutoModelForCausalLM
    more = _quantisation(source) | ({"num_labels": 1} if is_reward else {})
    try:
        with _no_progress_bar(), _no_load_report(is_silent=is_reward):
            model, info = kind.from_pretrained(
                source.model,
                revision=source.revision,
                dtype=torch_dtype(source.dtype),
                trust_remote_code=source.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                **more,
            )
    except (OSError, ValueError, SafetensorError, HfHubHTTPError, json.JSONDecodeError) as error:
        raise ModelError(
            f"{source.model!r} must be a causal language model: {_first_line(error)}"
        ) from error
    new_head = set(head_names(model)) & set(info["missing_keys"])
    _draw_head(model, new_head)
    missing = sorted(set(info["missing_keys"]) - new_head)
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
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch_dtype(source.dtype),
        )
    }


def head_names(model: PreTrainedModel) -> list[str]:
    """Names of the parameters of a reward model's head; none for a language model."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if not name.startswith(f"{model.base_model_prefix}.")]


def _draw_head(model: PreTrainedModel, names: Collection[str]) -> None:
    """Give a head that was not in the checkpoint values that no other seed decides."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in sorted(names):
            weight = model.get_parameter(name)
            drawn = torch.randn(weight.shape, generator=generator)
            weight.copy_(drawn * model.config.initializer_range)


def load_tokenizer(source: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer at `source`, with a padding token (the end token where it has none).

    Raises:
        ModelError: there is none, or it has no end token.
    """
    check_folder(source.model, "config.json", "a model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.model, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(f"{source.model!r} must hold a tokenizer: {_first_line(error)}") from error
    if tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer must have an end token, but that of {source.model!r} has none"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_adapter(model: PreTrainedModel, adapter: str) -> PeftModel:
    """`model` with the PEFT adapter at `adapter`, all frozen.

    Raises:
        ModelError: no adapter, no safetensors, or an adapter for another base model.
    """
    check_folder(adapter, "adapter_config.json", "a PEFT adapter")
    folder = local_folder(adapter, ADAPTER_FILES, "a PEFT adapter")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"the adapter {adapter!r} must hold adapter_model.safetensors, but does not; pickled "
            f"weights are not loaded"
        )
    try:
        with warnings.catch_warnings():
            # PEFT writes AdaLoRA's ranks under names of parameters, and warns of them when it reads
            warnings.filterwarnings("ignore", "The following rank_pattern keys", RuntimeWarning)
            # AdaLoRA's model cannot compute a loss unless it was loaded as one to train
            is_adalora = PeftConfig.from_pretrained(str(folder)).peft_type == PeftType.ADALORA
            tuned = PeftModel.from_pretrained(model, str(folder), is_trainable=is_adalora)
            tuned.requires_grad_(False)
        missing = _missing_adapter_weights(tuned, folder)
    except FROM_A_BAD_ADAPTER as error:
        raise ModelError(
            f"the adapter must be one for this base model, but {adapter!r} does not fit: "
            f"{_first_line(error)}"
        ) from error
    if missing:
        raise ModelError(
            f"the adapter must be one for this base model, but {adapter!r} and the model differ in "
            f"{len(missing)} weights, first {missing[0]}"
        )
    return tuned


def local_folder(name: str, patterns: Sequence[str], kind: str) -> Path:
    """The folder `name`, or a copy of the files of the hub repository that match `patterns`.

    Raises:
        ModelError: neither is there; says that it must be `kind`.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ModelError(f"{name!r} must be {kind}: {_first_line(error)}") from error


def _missing_adapter_weights(tuned: PeftModel, folder: Path) -> list[str]:
    """Names that are in the adapter's file or in the model, but not in both."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    # PEFT also saves the base's embeddings where they are targets, but not for each form of target.
    of_base = set(tuned.state_dict())
    return sorted(
        (stored - of_base) ^ set(get_peft_model_state_dict(tuned, save_embedding_layers=False))
    )


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a safetensors checkpoint by name, each read from disk when it is asked for."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)

    @property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the file that holds it."""
        return dict(self._files)

    @staticmethod
    def open(source: ModelOptions) -> "Checkpoint":
        """The checkpoint at `source`; only its headers are read.

        Raises:
            ModelError: it holds no safetensors.
        """
        check_folder(source.model, "config.json", "a model")
        files: dict[str, Path] = {}
        try:
            for path in _safetensors_files(source):
                with safe_open(path, framework="pt") as file:
                    files |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError, HfHubHTTPError, ValueError) as error:
            raise ModelError(
                f"{source.model!r} must hold its weights as safetensors: {_first_line(error)}"
            ) from error
        return Checkpoint(files)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def dtype(self) -> torch.dtype:
        """The dtype of most weights on disk."""
        counts: dict[torch.dtype, int] = {}
        for path in dict.fromkeys(self._files.values()):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    stored = STORED_DTYPES.get(file.get_slice(name).get_dtype(), torch.float32)
                    counts[stored] = counts.get(stored, 0) + 1
        return max(counts, key=lambda dtype: counts[dtype])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _safetensors_files(source: ModelOptions) -> list[Path]:
    """The weight files of a checkpoint, whole or sharded, fetched from the hub where needed."""

    def find(name: str, *, is_required: bool) -> Path | None:
        found = cached_file(
            source.model,
            name,
            revision=source.revision,
            _raise_exceptions_for_missing_entries=is_required,
        )
        return None if found is None else Path(found)

    index = find("model.safetensors.index.json", is_required=False)
    if index is None:
        single = find("model.safetensors", is_required=True)
        assert single is not None
        return [single]
    shards = dict.fromkeys(json.loads(index.read_text())["weight_map"].values())
    paths = [find(shard, is_required=True) for shard in shards]
    return [path for path in paths if path is not None]


def check_folder(name: str, wanted: str, kind: str) -> None:
    """Refuse a path that is not there, or a folder that lacks the file `wanted`.

    Raises:
        ModelError: `name` cannot be `kind`.
    """
    path = Path(name)
    if path.is_dir():
        if not (path / wanted).is_file():
            raise ModelError(f"{name!r} must be {kind}, but the folder holds no {wanted}")
    elif path.exists():
        raise ModelError(
            f"{name!r} must be {kind}: a folder or a name on the hub, but it is a file"
        )
    elif name.startswith((".", "/", "~")) or name.count("/") > 1 or not name.strip():
        raise ModelError(f"{name!r} must be {kind}, but there is no such folder")


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


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing its own bar on somebody's terminal."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _no_load_report(*, is_silent: bool) -> Iterator[None]:
    """Keep transformers from printing that a new head is new."""
    verbosity = logging.get_verbosity()
    if is_silent:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _first_line(error: Exception) -> str:
    """The first line of a library's message, and what to do if it is the network."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, LocalEntryNotFoundError):
            return "there is no such folder, and the hub cannot be reached to look for it there"
        cause = cause.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
