# SPDX-License-Identifier: Apache-2.0
"""The hash of what decides a model's results next to its weights: config and tokenizer.

Needs no torch.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from keylayers.files import json_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Keys that say where a config comes from, and what a tokenizer's backend keeps of its last call.
WITHOUT_EFFECT = ("_name_or_path", "name_or_path", "_commit_hash", "transformers_version")
OF_LAST_CALL = ("truncation", "padding")


def config_sha256(
    config: Mapping[str, Any],
    generation_config: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
) -> str:
    """The SHA-256 of config, generation config and tokenizer, in hexadecimal.

    The chat template is not part of it: prompts are hashed as they are rendered.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer in pure Python
        rules: dict[str, Any] = {"kind": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    else:
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in OF_LAST_CALL}
    about = {
        "backend": rules,
        "special_tokens": tokenizer.special_tokens_map,
        "clean_up_tokenization_spaces": getattr(tokenizer, "clean_up_tokenization_spaces", None),
    }
    return json_sha256([_text(part) for part in (dict(config), dict(generation_config), about)])


def _text(content: Mapping[str, Any]) -> str:
    """Canonical JSON; infinite numbers are allowed, unlike in `json_sha256`."""

    def plain(value: Any) -> Any:
        return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)

    def relevant(part: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in part.items() if name not in WITHOUT_EFFECT}

    parsed = json.loads(json.dumps(content, default=plain), object_hook=relevant)
    return json.dumps(parsed, sort_keys=True)
