# SPDX-License-Identifier: Apache-2.0
"""How much memory a step or pass holds, foreseen from a model's shape. Needs no torch.

The parts are those of `keylayers.ranking.memory`. What a block keeps and what the loss needs was
measured by `benchmarks/memory_budget.py` on Llama blocks, and is taken to grow with the widths of
the model; `tests/test_estimate.py` holds the sums against its record and a step of another shape.
"""

from keylayers.commands.study.sizes import ModelShape
from keylayers.model.options import ModelOptions
from keylayers.training.options import TrainingOptions

FLOAT = 4  # bytes of a float32
HALF = 2  # bytes of a bfloat16 or float16
NF4 = 0.516  # bytes a parameter, with the doubly quantised scale of each 64
# A block keeps so many numbers for each token when all its modules carry LoRA, in widths.
KEPT_HIDDEN, KEPT_INNER = 8.5, 4.0
# In half precision nearly as many bytes as in float32: LoRA's inputs stay float32.
KEPT_IN_HALF = 0.9
KEPT_FROZEN = 0.75  # of that, if no module of the block is trained
# The loss works through the vocabulary in chunks of so many tokens (trl, without Triton): a buffer
# of a chunk, and so many float32 copies of the logits in it.
CHUNK = 32_768
LOGITS = 7.2
ADAPTER_COPIES, FULL_COPIES = 4, 3  # (the matrices,) their gradient and AdamW's two moments


def step_bytes(
    shape: ModelShape,
    model: ModelOptions,
    tuning: TrainingOptions,
    num_tokens: float,
    share: float,
) -> float:
    """Bytes at the peak of a step, or of a pass of the mask.

    Args:
        shape: Of the model.
        model: How it is loaded; `dtype` auto counts as bfloat16, as on an accelerator.
        tuning: What is trained, and whether activations are recomputed.
        num_tokens: Of the largest batch.
        share: Of the modules that are trained; 0 for a pass of the mask.
    """
    is_float = tuning.is_full or model.dtype == "float32"
    precision = FLOAT if is_float else HALF
    kept_numbers = KEPT_HIDDEN * shape.hidden_size + KEPT_INNER * shape.intermediate_size
    block = num_tokens * FLOAT * kept_numbers * (1 if is_float else KEPT_IN_HALF)
    working = num_tokens * (precision * CHUNK + LOGITS * FLOAT * min(shape.vocabulary, CHUNK))
    if tuning.gradient_checkpointing:
        inputs = shape.num_blocks * num_tokens * precision * shape.hidden_size
        kept = inputs + block
        working = max(0.0, working - block)  # the loss is done when a block is computed anew
    else:
        kept = shape.num_blocks * block * (KEPT_FROZEN + (1 - KEPT_FROZEN) * share)
    return _weights(shape, model, precision) + _state(shape, tuning, share) + kept + working


def _weights(shape: ModelShape, model: ModelOptions, precision: int) -> float:
    inside = NF4 if model.load_in_4bit else precision
    outside = shape.num_parameters - shape.num_module_parameters
    return float(inside * shape.num_module_parameters + precision * outside)


def _state(shape: ModelShape, tuning: TrainingOptions, share: float) -> float:
    """What is trained in float32, its gradient and moments."""
    if tuning.is_full:
        return FULL_COPIES * FLOAT * share * shape.num_module_parameters
    return ADAPTER_COPIES * FLOAT * share * shape.num_lora_parameters(tuning.lora_rank)
