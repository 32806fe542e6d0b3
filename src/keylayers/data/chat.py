# SPDX-License-Identifier: Apache-2.0
"""Conversations tokenised, with the loss on the answers only.

The whole conversation is rendered as one text and tokenised once, so token boundaries are the same
as when the model is used. Offsets carry the spans of the answers over to tokens.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from keylayers.data.formats import Conversation
from keylayers.data.preferences import Preference
from keylayers.data.templates import ChatTemplate, Renderer, Span
from keylayers.data.turns import in_row
from keylayers.errors import DataError
from keylayers.model.options import Objective

IGNORED = -100  # the label that cross-entropy skips
ADDED_TOKENS = 2  # ORPO's trainer (TRL 1.16) adds a start and an end token where they are missing


@dataclass(frozen=True)
class Example:
    """What a trainer gets of one example, and what the cut to `max_length` tokens leaves of it."""

    row: dict[str, Any]  # the columns that the objective's trainer in TRL takes
    num_prompt_tokens: int  # before the first one that the loss counts, before the cut
    num_used_tokens: int  # after the cut; a pair has two sequences
    num_label_tokens: int  # that the loss counts, after the cut
    is_truncated: bool  # the end was cut off
    is_usable: bool  # something is left to learn
    is_last_answer_only: bool = False  # the template hides earlier answers, so the loss does too
    num_lost: int = 0  # answers whose thought or text the template leaves out
    max_id: int = 0  # the highest token


def encode_all(
    conversations: Iterable[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate | None,
    max_length: int,
) -> Iterator[Example]:
    """The tokens and labels of each conversation, in order.

    The loss counts every answer with the tokens that close it, and nothing else. Without a template
    it counts plain text as a whole.
    """
    renderer = None if template is None else Renderer(template, tokenizer)
    special = _special_tokens(tokenizer)
    for conversation in conversations:
        is_last_answer_only, num_lost = False, 0
        if renderer is None:
            ids, labels = _encode_text(conversation.text or "", tokenizer)
        else:
            with in_row(conversation.row_number):
                text, spans, is_last_answer_only = renderer.answers(conversation)
            num_lost = renderer.num_lost(conversation.messages, text)
            ids, labels = _tokenise(*_close(text, spans, tokenizer, special), tokenizer)
        is_label = [label != IGNORED for label in labels]
        num_label_tokens = sum(is_label[1:max_length])  # nothing predicts the first token
        yield Example(
            row={"input_ids": ids[:max_length], "labels": labels[:max_length]},
            num_prompt_tokens=is_label.index(True) if any(is_label) else len(ids),
            num_used_tokens=min(len(ids), max_length),
            num_label_tokens=num_label_tokens,
            is_truncated=len(ids) > max_length,
            is_usable=num_label_tokens > 0,
            is_last_answer_only=is_last_answer_only,
            num_lost=num_lost,
            max_id=max(ids[:max_length]),
        )


def _encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Plain text as the tokenizer takes it, plus the end-of-sequence token if there is one."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if bos is not None and ids[:2] == [bos, bos]:  # the text has one, the tokenizer adds one
        ids = ids[1:]
    if eos is not None and ids[-1:] != [eos]:
        ids = [*ids, eos]
    return ids, [IGNORED if ids[:1] == [bos] else ids[0], *ids[1:]]


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> str:
    """A pattern that matches any special token; without special tokens it never matches."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return "|".join(re.escape(token) for token in found) or "(?!)"


def _close(
    text: str, spans: list[Span], tokenizer: PreTrainedTokenizerBase, special: str
) -> tuple[str, list[Span]]:
    """The text and spans, changed so that the model learns to stop: answers end with a token."""
    start, end = spans[-1]
    if re.search(rf"(?:{special})\s*\Z", text[start:end]):
        return text, spans
    if closing := re.match(rf"\s*(?:{special})", text[end:]):
        # The closing token is outside the markers, for earlier answers too.
        mark = closing.group()
        return text, [(a, b + len(mark) if text.startswith(mark, b) else b) for a, b in spans]
    if tokenizer.eos_token is None:
        raise DataError(
            "An answer must end with a stop token, but neither the chat template nor the tokenizer "
            "has one; set the tokenizer's `eos_token`."
        )
    eos: str = tokenizer.eos_token
    return text[:end] + eos, [*spans[:-1], (start, end + len(eos))]


def _tokenise(
    text: str, spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """The tokens, and labels for those that hold at least one character of an answer."""
    # The rendered text has all special tokens already; adding them would double the first.
    tokens = partial(tokenizer, add_special_tokens=False, verbose=False)
    ids: list[int] = []
    labels: list[int] = []
    if tokenizer.is_fast:
        is_answer = bytearray(len(text))
        for start, end in spans:
            is_answer[start:end] = b"\1" * (end - start)
        found = tokens(text, return_offsets_mapping=True)
        ids = found["input_ids"]
        # A token whose offsets are equal holds the blank just before them: tokenizers like GPT-2's
        # leave blanks out of offsets.
        held = [is_answer[start - (start == end) : end] for start, end in found["offset_mapping"]]
        labels = [token if 1 in part else IGNORED for token, part in zip(ids, held, strict=True)]
        return ids, labels
    # Without offsets, answers are tokenised apart, which can change boundaries where they meet.
    bounds = pairwise([0, *chain.from_iterable(spans), len(text)])
    for number, (start, end) in enumerate(bounds):
        piece = tokens(text[start:end])["input_ids"]
        ids += piece
        labels += piece if number % 2 else [IGNORED] * len(piece)
    return ids, labels


def measure_all(
    preferences: Iterable[Preference],
    objective: Objective,
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    max_length: int,
) -> Iterator[Example]:
    """Each preference with its lengths in tokens, as TRL's trainers will tokenise it.

    They would drop some examples, or cut them until no answer is left.
    """
    renderer = Renderer(template, tokenizer)
    for preference in preferences:
        wholes = [preference.prompt + answer for answer in preference.answers]
        with in_row(preference.row_number):
            prompt, _ = renderer.render(preference.prompt, prompt=True)
            texts = [renderer.render(messages)[0] for messages in wholes]
            for messages, text in zip(wholes, texts, strict=True):
                renderer.check_answer(messages, text)
        tokens = tokenizer([prompt, *texts], add_special_tokens=False, verbose=False)["input_ids"]
        num_prompt_tokens, whole = len(tokens[0]), [len(ids) for ids in tokens[1:]]
        cut = [min(num_tokens, max_length) for num_tokens in whole]
        is_truncated = cut != whole
        has_room = num_prompt_tokens + ADDED_TOKENS <= max_length
        yield Example(
            row={
                name: renderer.in_form(part) if isinstance(part, list) else part
                for name, part in preference.row().items()
            },
            num_prompt_tokens=num_prompt_tokens,
            num_used_tokens=sum(cut),
            num_label_tokens=sum(max(0, num - num_prompt_tokens) for num in cut),
            is_truncated=is_truncated,
            # A reward model must see both answers whole.
            is_usable=not is_truncated if objective == "reward" else has_room,
            num_lost=sum(map(renderer.num_lost, wholes, texts)),
            max_id=max(max(ids, default=0) for ids in tokens[1:]),
        )
