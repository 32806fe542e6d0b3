# SPDX-License-Identifier: Apache-2.0
"""Conversations tokenised, with the loss on the answers only.

The whole conversation is rendered as one text and tokenised once, so token boundaries are the same
as when the model is used. Offsets carry the spans of the answers over to tokens.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import TYPE_CHECKING, Any

from keylayers.data.formats import Conversation
from keylayers.data.preferences import Preference
from keylayers.data.templates import ChatTemplate, Renderer, Span
from keylayers.errors import DataError
from keylayers.model.options import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that cross-entropy skips
ADDED_TOKENS = 2  # ORPO's trainer (TRL 1.16) adds a start and an end token where they are missing
_BATCH_SIZE = 512  # conversations; bounds the memory that offsets take


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
    tokenizer: "PreTrainedTokenizerBase",
    template: ChatTemplate | None,
    max_length: int,
) -> Iterator[Example]:
    """The tokens and labels of each conversation, in order.

    The loss counts every answer with the tokens that close it, and nothing else. Without a template
    it counts plain text as a whole.
    """
    remaining = iter(conversations)
    while batch := list(islice(remaining, _BATCH_SIZE)):
        if template is None:
            tokens = _encode_texts(batch, tokenizer)
        else:
            tokens = _encode_chats(batch, tokenizer, template)
        for ids, labels, is_last_answer_only, num_lost in tokens:
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


# ids, labels, is_last_answer_only, num_lost
_Tokens = Iterator[tuple[list[int], list[int], bool, int]]


def _encode_texts(batch: Sequence[Conversation], tokenizer: "PreTrainedTokenizerBase") -> _Tokens:
    """Plain text as the tokenizer takes it, plus the end-of-sequence token if there is one."""
    texts = [conversation.text or "" for conversation in batch]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for ids in tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]:
        if bos is not None and ids[:2] == [bos, bos]:  # the text has one, the tokenizer adds one
            ids = ids[1:]
        whole = ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
        first = [IGNORED] if whole[:1] == [bos] else whole[:1]
        yield whole, [*first, *whole[1:]], False, 0


def _encode_chats(
    batch: Sequence[Conversation], tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate
) -> _Tokens:
    renderer, special = Renderer(template, tokenizer), _special_tokens(tokenizer)
    rendered = [_answers(renderer, conversation) for conversation in batch]
    closed = [_close(text, spans, tokenizer, special) for text, spans, _ in rendered]
    # The rendered text has all special tokens already; adding them would double the first.
    if tokenizer.is_fast:
        encoded = tokenizer(
            [text for text, _ in closed],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        both = zip(encoded["input_ids"], encoded["offset_mapping"], closed, strict=True)
        tokenised = [(ids, _label(ids, offsets, *found)) for ids, offsets, found in both]
    else:
        tokenised = [_tokenise_pieces(text, spans, tokenizer) for text, spans in closed]
    for conversation, (text, _, is_last), (ids, labels) in zip(
        batch, rendered, tokenised, strict=True
    ):
        yield ids, labels, is_last, renderer.num_lost(conversation.messages, text)


def _answers(renderer: Renderer, conversation: Conversation) -> tuple[str, list[Span], bool]:
    try:
        return renderer.answers(conversation)
    except DataError as error:
        raise DataError(f"Row {conversation.row_number}: {error}") from error


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A pattern that matches any special token; without special tokens it never matches."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return "|".join(re.escape(token) for token in found) or "(?!)"


def _close(
    text: str, spans: list[Span], tokenizer: "PreTrainedTokenizerBase", special: str
) -> tuple[str, list[Span]]:
    """The text and spans, changed if needed so that the last answer ends with a stop token.

    Otherwise the tuned model would never learn to stop.
    """
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


def _label(
    ids: Sequence[int], offsets: Sequence[Span], text: str, spans: Sequence[Span]
) -> list[int]:
    """Labels for the tokens that hold at least one character of an answer."""
    is_answer = bytearray(len(text))
    for start, end in spans:
        is_answer[start:end] = b"\1" * (end - start)
    # A token whose offsets are equal holds the blank just before them: tokenizers like GPT-2's
    # leave blanks out of offsets.
    held = [is_answer[start - (start == end) : end] for start, end in offsets]
    return [token if 1 in part else IGNORED for token, part in zip(ids, held, strict=True)]


def _tokenise_pieces(
    text: str, spans: Sequence[Span], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int]]:
    """Without offsets, answers are tokenised apart, which can change boundaries where they meet."""
    ids: list[int] = []
    labels: list[int] = []
    bounds = pairwise([0, *chain.from_iterable(spans), len(text)])
    for number, (start, end) in enumerate(bounds):
        piece = tokenizer.encode(text[start:end], add_special_tokens=False)
        ids += piece
        labels += piece if number % 2 else [IGNORED] * len(piece)
    return ids, labels


def measure_all(
    preferences: Iterable[Preference],
    objective: Objective,
    tokenizer: "PreTrainedTokenizerBase",
    template: ChatTemplate,
    max_length: int,
) -> Iterator[Example]:
    """Each preference with its lengths in tokens.

    TRL's trainers tokenise the messages. We measure them to leave out and count the examples that
    a trainer would drop or cut until no answer is left.
    """
    renderer = Renderer(template, tokenizer)

    def ids_of(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    for preference in preferences:
        wholes = [preference.prompt + answer for answer in preference.answers]
        try:
            prompt, _ = renderer.render(preference.prompt, prompt=True)
            texts = [renderer.render(messages)[0] for messages in wholes]
            for messages, text in zip(wholes, texts, strict=True):
                renderer.check_answer(messages, text)
        except DataError as error:
            raise DataError(f"Row {preference.row_number}: {error}") from error
        num_prompt_tokens = len(ids_of(prompt))
        both = [ids_of(text) for text in texts]
        whole = [len(ids) for ids in both]
        cut = [min(num_tokens, max_length) for num_tokens in whole]
        is_truncated = cut != whole
        has_room = num_prompt_tokens + ADDED_TOKENS <= max_length
        row = preference.row()
        yield Example(
            row={
                name: renderer.in_form(part) if isinstance(part, list) else part
                for name, part in row.items()
            },
            num_prompt_tokens=num_prompt_tokens,
            num_used_tokens=sum(cut),
            num_label_tokens=sum(max(0, num - num_prompt_tokens) for num in cut),
            is_truncated=is_truncated,
            # A reward model must see both answers whole.
            is_usable=not is_truncated if objective == "reward" else has_room,
            num_lost=sum(map(renderer.num_lost, wholes, texts)),
            max_id=max(max(ids, default=0) for ids in both),
        )
