# SPDX-License-Identifier: Apache-2.0
"""Sizes of models and data that are known without loading them: from their files, or a small table.

Needs no torch and no network.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from keylayers.ranking.ranked_module import RankedModule
from keylayers.ranking.ranking import Ranking

BYTES_PER_TOKEN = 4  # of English text, in the tokenizers of today
STORED_BYTES = 2  # a parameter on the hub
# Architectures whose blocks are those of `ModelShape`.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class ModelShape:
    """A decoder of blocks with seven matrices each: q, k, v, o, gate, up and down.

    Attributes:
        num_blocks: Decoder blocks.
        hidden_size: Width of the residual stream.
        intermediate_size: Width inside the MLP.
        num_heads: Attention heads.
        num_key_value_heads: Of those, with keys and values of their own.
        head_size: Width of a head.
        vocabulary: Tokens.
        max_positions: Longest example in tokens.
        is_tied: The head is the embedding.
    """

    num_blocks: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    vocabulary: int
    max_positions: int
    is_tied: bool = False

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name in a block -> inputs and outputs of the matrix."""
        heads = self.num_heads * self.head_size
        keys = self.num_key_value_heads * self.head_size
        width, inner = self.hidden_size, self.intermediate_size
        return {
            "self_attn.q_proj": (width, heads),
            "self_attn.k_proj": (width, keys),
            "self_attn.v_proj": (width, keys),
            "self_attn.o_proj": (heads, width),
            "mlp.gate_proj": (width, inner),
            "mlp.up_proj": (width, inner),
            "mlp.down_proj": (inner, width),
        }

    @property
    def num_modules(self) -> int:
        """Matrices in all blocks."""
        return self.num_blocks * len(self.matrices)

    @property
    def num_module_parameters(self) -> int:
        """Numbers in all of them."""
        return self.num_blocks * sum(rows * columns for rows, columns in self.matrices.values())

    @property
    def num_parameters(self) -> int:
        """Those, the embedding and the head; norms and biases are left out."""
        num_outside = self.vocabulary * self.hidden_size * (1 if self.is_tied else 2)
        return self.num_module_parameters + num_outside

    def num_lora_parameters(self, lora_rank: int) -> int:
        """Numbers in LoRA's matrices on all modules."""
        per_block = sum(rows + columns for rows, columns in self.matrices.values())
        return self.num_blocks * per_block * lora_rank

    def ranking(self, options: Mapping[str, Any]) -> Ranking:
        """Its modules in the form in which `keylayers.ranking.cost` prices them, without scores."""
        modules = tuple(
            RankedModule(
                f"model.layers.{block}.{name}", block, name.partition(".")[2], rows * columns, None
            )
            for block in range(self.num_blocks)
            for name, (rows, columns) in self.matrices.items()
        )
        model = {"num_head_parameters": self.vocabulary * self.hidden_size}
        return Ranking(modules, "none", provenance={"options": options, "model": model})


@dataclass(frozen=True)
class DataSize:
    """How much text a data set holds.

    Attributes:
        num_examples: Rows.
        mean_bytes: Of text in a row.
        longest_bytes: Of the longest row; None where it is not known.
        download_bytes: From the hub; None for local files.
    """

    num_examples: int
    mean_bytes: float
    longest_bytes: int | None = None
    download_bytes: int | None = None


# From the models' published configs.
KNOWN_MODELS = {
    "meta-llama/Llama-2-7b-hf": ModelShape(32, 4096, 11008, 32, 32, 128, 32_000, 4096),
    "meta-llama/Llama-3.1-8B": ModelShape(32, 4096, 14336, 32, 8, 128, 128_256, 131_072),
    "mistralai/Mistral-7B-v0.1": ModelShape(32, 4096, 14336, 32, 8, 128, 32_000, 32_768),
}
# From the hub's pages of these data sets, or of copies of them: rows, download, and the bytes of
# question and answer in a row (those of No Robots and s1K-1.1, which hold more columns, roughly).
KNOWN_DATA = {
    "GAIR/lima": DataSize(1030, 2_900.0, None, 3_000_000),
    "HuggingFaceH4/no_robots": DataSize(9500, 1_300.0, None, 18_900_000),
    "vicgalle/alpaca-gpt4": DataSize(52_002, 900.0, None, 48_400_000),
    "GAIR/LIMO": DataSize(817, 19_700.0, None, 16_100_000),
    "simplescaling/s1K-1.1": DataSize(1000, 32_000.0, None, 22_300_000),
}


@cache
def model_shape(name: str) -> ModelShape | None:
    """The shape of a model in a folder or of a known one on the hub; None if it is not known."""
    if not Path(name).exists():
        return KNOWN_MODELS.get(name)
    try:
        config = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        if config.get("model_type") not in MODEL_TYPES:
            return None
        num_heads = config["num_attention_heads"]
        return ModelShape(
            num_blocks=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_heads=num_heads,
            num_key_value_heads=config.get("num_key_value_heads") or num_heads,
            head_size=config.get("head_dim") or config["hidden_size"] // num_heads,
            vocabulary=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            is_tied=bool(config.get("tie_word_embeddings")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


@cache
def data_size(name: str) -> DataSize | None:
    """The size of a json or jsonl file or of a known set on the hub; None if it is not known."""
    path = Path(name)
    if not path.exists():
        return KNOWN_DATA.get(name)
    try:
        held = path.read_bytes()
        if path.suffix == ".json":
            rows = (json.dumps(row, ensure_ascii=False) for row in json.loads(held))
            lengths = [len(row.encode("utf-8")) for row in rows]
        elif path.suffix == ".jsonl":
            lengths = [len(line) for line in held.split(b"\n") if line.strip()]
        else:
            return None
    except (OSError, ValueError, TypeError):
        return None
    return DataSize(len(lengths), sum(lengths) / len(lengths), max(lengths)) if lengths else None
