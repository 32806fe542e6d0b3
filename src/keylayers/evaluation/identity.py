# SPDX-License-Identifier: Apache-2.0
"""What decides a model's results beside its weights: config, generation config, tokenizer.

Needs no torch.
"""

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from keylayers.files import json_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Where a config comes from and what wrote it, which changes no result.
OF_ORIGIN = ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version")
# What a tokenizer's backend keeps of the last call.
OF_LAST_CALL = ("truncation", "padding")


def config_sha256(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
) -> str:
    """The SHA-256 of what decides a model's results beside its weights, in hexadecimal.

    Two models with equal weights, whose files differ in the base of the rotary embedding, the end
    token or the vocabulary, so have two hashes. A copy in another place has the same. The chat
    template is no part of it, for prompts are hashed as they are rendered.

    Args:
        config: `to_dict()` of a loaded model's config, or the content of config.json. The two give
            different hashes: a caller keeps to one.
        generation_config: Likewise, or the content of generation_config.json; empty without one.
        tokenizer: The one that the model is used with.
    """
    return json_sha256([_plain(config), _plain(generation_config), _about(tokenizer)])


def _about(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """All that decides which tokens a text is, and which text tokens are."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # of Python alone
        found: dict[str, Any] = {"kind": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        found = {k: v for k, v in json.loads(backend.to_str()).items() if k not in OF_LAST_CALL}
    return {
        "backend": found,
        "special_tokens": _plain(tokenizer.special_tokens_map),
        "clean_up_tokenization_spaces": getattr(tokenizer, "clean_up_tokenization_spaces", None),
    }


def _plain(value: Any) -> Any:
    """The value as JSON has it: text as keys, tuples as lists, what is not finite as text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if k not in OF_ORIGIN}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)
