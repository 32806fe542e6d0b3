# SPDX-License-Identifier: Apache-2.0
"""Replies of a model to a batch of prompts, with transformers' `generate`."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from keylayers.data.chat import ChatTemplate, render
from keylayers.data.formats import Message
from keylayers.errors import ConfigError, ModelError
from keylayers.model.loading import max_positions

Ending = Literal["stop", "length", "no room"]  # by itself, at the limit, or before it began
_PROBE = "answer"  # the text after which a template shows how it closes an answer


@dataclass(frozen=True)
class Speaker:
    """A model that can be talked to.

    Attributes:
        model: In evaluation, where it is to run.
        tokenizer: Its own.
        template: How it is addressed.
        sha256: Which model it is.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    sha256: str


def replies(
    speaker: Speaker, prompts: Sequence[list[int]], sampling: GenerationConfig
) -> list[tuple[str, Ending, int]]:
    """Text, ending and number of tokens of the reply to each prompt.

    Where the model's longest sequence leaves less room than the limit, prompts are continued one by
    one, each as far as its own length allows.

    Args:
        speaker: Who replies.
        prompts: In tokens.
        sampling: How; from `plain_sampling`.

    Raises:
        ModelError: the model gives no probabilities to sample from.
        ConfigError: the batch does not fit into memory.
    """
    longest = max_positions(speaker.model)
    limit = sampling.max_new_tokens
    room = [limit if longest is None else min(limit, longest - len(one)) for one in prompts]
    if min(room) == limit:
        return _continued(speaker, prompts, sampling)
    found: list[tuple[str, Ending, int]] = []
    for prompt, tokens in zip(prompts, room, strict=True):
        if tokens < 1:
            found.append(("", "no room", 0))
            continue
        shorter = GenerationConfig(**{**sampling.to_dict(), "max_new_tokens": tokens})
        found += _continued(speaker, [prompt], shorter)
    return found


@torch.inference_mode()
def _continued(
    speaker: Speaker, prompts: Sequence[list[int]], sampling: GenerationConfig
) -> list[tuple[str, Ending, int]]:
    device = speaker.model.device
    width = max(len(one) for one in prompts)
    padding = [width - len(one) for one in prompts]
    pad = speaker.tokenizer.pad_token_id
    ids = [[pad] * more + one for one, more in zip(prompts, padding, strict=True)]
    mask = [[0] * more + [1] * len(one) for one, more in zip(prompts, padding, strict=True)]
    try:
        with _nothing_of_its_own(speaker.model):
            found = speaker.model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=sampling,
            )
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the answers of a batch must fit into memory, but {len(prompts)} of "
            f"{sampling.max_new_tokens} tokens do not; lower the batch size or `max_new_tokens`"
        ) from error
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise ModelError(
            "the model must give probabilities to sample answers from, but gives NaN or infinity; "
            "its weights are damaged, or `dtype` is too narrow for them"
        ) from error
    stops = set(sampling.eos_token_id)
    return [_reply(row, stops, speaker.tokenizer) for row in found[:, width:].tolist()]


@contextmanager
def _nothing_of_its_own(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Take the model's own settings from it, with which `generate` fills all that is not said.

    Without this its file could forbid words or repetitions, and no option would show it.
    """
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    own = plain.generation_config
    plain.generation_config = GenerationConfig(bos_token_id=own.bos_token_id)
    try:
        yield
    finally:
        plain.generation_config = own


def _reply(
    tokens: list[int], stops: set[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, Ending, int]:
    end = next((index for index, token in enumerate(tokens) if token in stops), None)
    said = tokens if end is None else tokens[:end]
    text = tokenizer.decode(said, skip_special_tokens=True).strip()
    return text, "length" if end is None else "stop", len(said)


def plain_sampling(
    temperature: float, limit: int, stops: Sequence[int], speaker: Speaker, top_p: float = 1.0
) -> GenerationConfig:
    """Sampling at a temperature, whatever the model's own file asks for beside it.

    Args:
        temperature: 0 for the likeliest token, always.
        limit: Longest reply in tokens.
        stops: Tokens that end it, from `stop_tokens`.
        speaker: Who replies.
        top_p: Draw from the likeliest tokens that have this share of the probability together.
    """
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    return GenerationConfig(
        do_sample=temperature > 0,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=limit,
        eos_token_id=list(stops),
        pad_token_id=speaker.tokenizer.pad_token_id,
        **drawn,
    )


def stop_tokens(speaker: Speaker) -> list[int]:
    """The tokens that end an answer: the tokenizer's, the model's, and the chat template's."""
    tokenizer = speaker.tokenizer
    of_model = speaker.model.generation_config.eos_token_id
    found = [tokenizer.eos_token_id, *(of_model if isinstance(of_model, list) else [of_model])]
    messages = [Message("user", _PROBE), Message("assistant", _PROBE)]
    text, _ = render(messages, tokenizer, speaker.template)
    closing = text.rpartition(_PROBE)[2]
    first = re.match(r"\s*(.*)", closing, re.DOTALL)
    ids = tokenizer.encode(first[1] if first else "", add_special_tokens=False)
    if ids and ids[0] in tokenizer.all_special_ids:
        found.append(ids[0])
    return list(dict.fromkeys(token for token in found if token is not None))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed in the block, and leave the random state as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
