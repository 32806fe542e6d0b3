# SPDX-License-Identifier: Apache-2.0
"""Conversations rendered by a chat template and tokenised, with the loss on the answers only.

The whole conversation is rendered as one text and tokenised once, so token boundaries are the same
as when the model is used. The template's `{% generation %}` markers say which characters are
answers; without markers, rendering turn by turn does. Offsets carry that over to tokens.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from keylayers.data.formats import Conversation, Message
from keylayers.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that cross-entropy skips
_BATCH_SIZE = 512  # conversations; bounds the memory that offsets take
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

# "alpaca" is the default for models without a template because it is plain words. ChatML's marks
# are new tokens for most base models: if they are added, their embeddings are untrained; if not,
# each turn gets a dozen pieces that merge with the text around them. The end-of-sequence token ends
# every answer, so that a conversation reads the same in training and when it is continued later.
BUILT_IN = {
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'assistant' %}{{ '### Response:\n' }}"
        "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
        "{% if not loop.last %}{{ '\n\n' }}{% endif %}"
        "{% elif message['role'] == 'user' %}"
        "{{ '### Instruction:\n' + message['content'] + '\n\n' }}"
        "{% else %}{{ message['content'] + '\n\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\n' }}{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] }}{{ '<|im_end|>' }}"
        "{% if eos_token != '<|im_end|>' %}{{ eos_token }}{% endif %}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}

_ERRORS = (AttributeError, TypeError, ValueError)
_Span = tuple[int, int]  # first character, and the one after the last


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template for conversations, and where it came from."""

    name: str
    text: str
    source: Literal["model", "built-in", "file"]

    @property
    def has_markers(self) -> bool:
        """Whether the template itself says which parts are answers."""
        return _MARKER.search(self.text) is not None


@dataclass(frozen=True)
class Encoded:
    """One example for a causal language model, cut to the allowed length.

    Attributes:
        input_ids: Its tokens.
        labels: The token itself where the loss counts it, -100 elsewhere; not shifted.
        num_tokens: Length before the cut.
        num_prompt_tokens: Tokens before the first one that the loss counts, before the cut.
        is_last_answer_only: The template hides earlier answers, so the loss leaves them out.
    """

    input_ids: list[int]
    labels: list[int]
    num_tokens: int
    num_prompt_tokens: int
    is_last_answer_only: bool

    @property
    def num_used_tokens(self) -> int:
        """Tokens after the cut."""
        return len(self.input_ids)

    @property
    def num_label_tokens(self) -> int:
        """Tokens that the loss counts; never the first, which nothing predicts."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def is_truncated(self) -> bool:
        """Whether the end was cut off."""
        return self.num_tokens > len(self.input_ids)

    @property
    def is_usable(self) -> bool:
        """Whether anything is left to learn."""
        return self.num_label_tokens > 0

    def row(self) -> dict[str, object]:
        """The columns that TRL's trainer takes as they are."""
        return {"input_ids": self.input_ids, "labels": self.labels}


def resolve_template(tokenizer: "PreTrainedTokenizerBase", choice: str | None) -> ChatTemplate:
    """The template to use.

    Args:
        tokenizer: Its own template is the default; if it has none, "alpaca" is.
        choice: "alpaca", "chatml" or the path of a Jinja file.

    Raises:
        ConfigError: the choice is neither a built-in template nor a file.
    """
    if choice is None and tokenizer.chat_template:
        try:
            return ChatTemplate("model", tokenizer.get_chat_template(), "model")
        except ValueError as error:
            raise ConfigError(
                "The tokenizer must have a default chat template, it has only named ones; "
                "choose one with `--chat-template` as a file."
            ) from error
    name = choice or "alpaca"
    if name in BUILT_IN:
        # Rendered text is tokenised without the tokenizer's own special tokens, so a built-in
        # template writes the start token itself if the tokenizer always puts one.
        bos = tokenizer.bos_token_id
        start = "{{ bos_token }}" if bos is not None and tokenizer.encode("a")[:1] == [bos] else ""
        return ChatTemplate(name, start + BUILT_IN[name], "built-in")
    path = Path(name).expanduser()
    try:
        return ChatTemplate(path.name, path.read_text(encoding="utf-8"), "file")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"`chat_template` must be {', '.join(BUILT_IN)} or a readable Jinja file, got {name!r}"
            f"{did_you_mean(name, BUILT_IN)}"
        ) from error


def encode_all(
    conversations: Iterable[Conversation],
    tokenizer: "PreTrainedTokenizerBase",
    template: ChatTemplate | None,
    max_length: int,
) -> Iterator[Encoded]:
    """The tokens and labels of each conversation, in order.

    The loss counts every answer with the tokens that close it, and nothing else. If the template
    closes the last answer with no special token, the end-of-sequence token is added, or the tuned
    model would never learn to stop. Plain text counts as a whole.

    Args:
        conversations: All with messages, or all plain text.
        tokenizer: A fast tokenizer has offsets and is exact. With others the pieces of a
            conversation are tokenised separately, which can change boundaries where they meet.
        template: None for plain text.
        max_length: In tokens; longer conversations lose their end.

    Raises:
        DataError: the template fails, loses the answer, or hides where it is.
    """
    special = _special_tokens(tokenizer)
    remaining = iter(conversations)
    while batch := list(islice(remaining, _BATCH_SIZE)):
        if template is None:
            yield from _encode_texts(batch, tokenizer, max_length)
            continue
        rendered = [_locate(conversation.messages, tokenizer, template) for conversation in batch]
        closed = [_close(text, spans, tokenizer, special) for text, spans in rendered]
        tokenised = _tokenise(closed, tokenizer)
        for conversation, (_, spans), (ids, labels) in zip(batch, closed, tokenised, strict=True):
            num_answers = sum(message.role == "assistant" for message in conversation.messages)
            yield _cut(ids, labels, max_length, len(spans) < num_answers)


def _cut(ids: list[int], labels: list[int], max_length: int, is_last_answer_only: bool) -> Encoded:
    num_prompt_tokens = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
    parts = ids[:max_length], labels[:max_length]
    return Encoded(*parts, len(ids), num_prompt_tokens, is_last_answer_only)


def _encode_texts(
    batch: Sequence[Conversation], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> Iterator[Encoded]:
    """Plain text as the tokenizer takes it, plus the end-of-sequence token if there is one."""
    texts = [conversation.text or "" for conversation in batch]
    eos = tokenizer.eos_token_id
    for ids in tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]:
        whole = ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
        yield _cut(whole, list(whole), max_length, is_last_answer_only=False)


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A pattern that matches any special token; without special tokens it never matches."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return "|".join(re.escape(token) for token in found) or "(?!)"


def render(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    template: ChatTemplate,
    *,
    prompt: bool = False,
) -> tuple[str, list[_Span]]:
    """The text that `apply_chat_template` makes, and the spans inside generation markers."""
    # transformers 5.23: `apply_chat_template` returns the marked spans as tokens, and loses or
    # overruns spans that begin or end with a character outside all tokens. The function below,
    # which it calls, returns characters.
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        texts, spans = render_jinja_template(
            [[{"role": message.role, "content": message.content} for message in messages]],
            chat_template=template.text,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=template.has_markers,
            **tokenizer.special_tokens_map,
        )
    # A template is a program, so it can also fail with the errors of Python's operators.
    except (TemplateError, ArithmeticError, LookupError, *_ERRORS) as error:
        reason = " ".join(str(error).split())[:200]
        must = f"render every conversation, it failed with: {reason}"
        raise _wrong(template, must) from error
    return texts[0], [tuple(span) for span in spans[0]] if spans else []


def _locate(
    messages: Sequence[Message], tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate
) -> tuple[str, list[_Span]]:
    """The rendered conversation and the spans of its answers, at least that of the last one."""
    text, spans = render(messages, tokenizer, template)
    answer = messages[-1].content.strip()
    if not text.strip():
        raise _wrong(template, "render every conversation, it rendered nothing")
    if answer not in text:
        raise _wrong(template, f"render the whole answer, it lost {answer[:60]!r}")
    if not template.has_markers:
        spans = _prefix_spans(messages, tokenizer, template, text)
    if not spans or answer not in text[slice(*spans[-1])]:
        raise _wrong(
            template,
            f"show where the answer {answer[:60]!r} is, by `{{% generation %}}` markers around it "
            "or by rendering the turns before it the same with and without it",
        )
    return text, spans


def _wrong(template: ChatTemplate, must: str) -> DataError:
    return DataError(
        f"The chat template {template.name!r} must {must}; fix the template or choose another "
        "`--chat-template`."
    )


def _prefix_spans(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    template: ChatTemplate,
    text: str,
) -> list[_Span]:
    """The spans of all answers; only the last if later turns change how others are rendered."""

    def span(end: int) -> _Span | None:
        try:
            before, _ = render(messages[: end - 1], tokenizer, template, prompt=True)
            is_last = end == len(messages)
            after = text if is_last else render(messages[:end], tokenizer, template)[0]
        except DataError:  # the template renders the whole conversation but refuses this part
            return None
        is_prefix = after.startswith(before) and text.startswith(after)
        return (len(before), len(after)) if is_prefix else None

    ends = [end for end, message in enumerate(messages, 1) if message.role == "assistant"]
    spans = [span(end) for end in ends]
    return [found for found in (spans[-1:] if None in spans else spans) if found is not None]


def _close(
    text: str, spans: list[_Span], tokenizer: "PreTrainedTokenizerBase", special: str
) -> tuple[str, list[_Span]]:
    """The text and spans, changed if needed so that the last answer ends with a stop token."""
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
    closed: Sequence[tuple[str, list[_Span]]], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids and labels of every text, given the spans of its answers."""
    if not tokenizer.is_fast:
        for text, spans in closed:
            yield _tokenise_pieces(text, spans, tokenizer)
        return
    # The rendered text has all special tokens already; adding them would double the first.
    encoded = tokenizer(
        [text for text, _ in closed],
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    for (_, spans), ids, offsets in zip(
        closed, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        yield ids, _label(ids, offsets, spans)


def _label(ids: list[int], offsets: Sequence[_Span], spans: Sequence[_Span]) -> list[int]:
    """Labels for tokens that hold at least one character of a span.

    A token whose offsets are equal holds the blank just before them: tokenizers like GPT-2's leave
    blanks out of offsets.
    """
    labels = [IGNORED] * len(ids)
    k = 0
    for i, (start, end) in enumerate(offsets):
        while k < len(spans) and spans[k][1] <= start and spans[k][1] < end:
            k += 1
        if k < len(spans) and end > spans[k][0]:
            labels[i] = ids[i]
    return labels


def _tokenise_pieces(
    text: str, spans: Sequence[_Span], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    position = 0
    for start, end in [*spans, (len(text), len(text))]:
        for piece, counts in ((text[position:start], False), (text[start:end], True)):
            part = tokenizer.encode(piece, add_special_tokens=False) if piece else []
            ids += part
            labels += part if counts else [IGNORED] * len(part)
        position = end
    return ids, labels
