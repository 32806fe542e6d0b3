# SPDX-License-Identifier: Apache-2.0
"""Conversations rendered by a chat template and cut into tokens, with the loss on the answers only.

The whole conversation is rendered as one text and tokenised once, so that token boundaries are
those of the model's own use. Which characters are answers comes from the template's
`{% generation %}` markers, or else from rendering turn by turn; offsets carry that over to tokens.
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
    import transformers

IGNORED = -100  # the label that cross-entropy skips
_BATCH_SIZE = 512  # conversations; bounds the memory that offsets take
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

# "alpaca" is the default for models without a template because it is plain words. ChatML's marks
# are new tokens for most base models: untrained embeddings where they are added, and where they are
# not, a dozen pieces per turn that merge with the text around them.
# The end-of-sequence token ends every answer and not just the last, so that a conversation reads
# the same in training and when it is continued later.
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
    """One example for a causal language model, cut to the allowed length."""

    input_ids: list[int]
    labels: list[int]
    """The token itself where the loss counts, -100 elsewhere; not shifted."""
    num_tokens: int
    """Length before the cut."""
    num_prompt_tokens: int
    """Tokens before the first one that the loss counts, before the cut."""
    is_last_answer_only: bool
    """Earlier answers could not be told from the rest, so the loss leaves them out."""

    @property
    def num_label_tokens(self) -> int:
        """Tokens that the loss counts; never the first, which nothing predicts."""
        return sum(label != IGNORED for label in self.labels[1:])

    @property
    def is_truncated(self) -> bool:
        """Whether the end was cut off."""
        return self.num_tokens > len(self.input_ids)


def resolve_template(
    tokenizer: "transformers.PreTrainedTokenizerBase", choice: str | None
) -> ChatTemplate:
    """The template to use.

    Args:
        tokenizer: its own template is used when there is no choice; if it has none, "alpaca".
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
        # template writes the start token itself, for the tokenizers that always put it.
        start = "{{ bos_token }}" if _puts_start_token(tokenizer) else ""
        return ChatTemplate(name, start + BUILT_IN[name], "built-in")
    path = Path(name).expanduser()
    try:
        return ChatTemplate(path.name, path.read_text(encoding="utf-8"), "file")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"`chat_template` must be {', '.join(BUILT_IN)} or a readable Jinja file, got {name!r}"
            f"{did_you_mean(name, BUILT_IN)}"
        ) from error


def encode(
    conversation: Conversation,
    tokenizer: "transformers.PreTrainedTokenizerBase",
    template: ChatTemplate | None,
    max_length: int,
) -> Encoded:
    """The tokens and labels of one conversation; `encode_all` is faster for many."""
    return next(encode_all([conversation], tokenizer, template, max_length))


def encode_all(
    conversations: Iterable[Conversation],
    tokenizer: "transformers.PreTrainedTokenizerBase",
    template: ChatTemplate | None,
    max_length: int,
) -> Iterator[Encoded]:
    """The tokens and labels of each conversation, in order.

    The loss counts every answer with the tokens that close it, and nothing else. A last answer that
    the template closes with no special token gets the end-of-sequence token, or the tuned model
    would never learn to stop. Plain text counts as a whole.

    Args:
        conversations: all with messages, or all plain text.
        tokenizer: one with offsets (fast) is exact; for others the pieces of a conversation are
            tokenised one by one, which can set different boundaries where they meet.
        template: not needed for plain text.
        max_length: in tokens; what is longer loses its end.

    Raises:
        DataError: the template fails, loses the answer, or hides where it is.
    """
    special = _special_tokens(tokenizer)
    remaining = iter(conversations)
    while batch := list(islice(remaining, _BATCH_SIZE)):
        if template is None:
            yield from _encode_texts(batch, tokenizer, max_length)
            continue
        rendered = [_locate(one.messages, tokenizer, template) for one in batch]
        closed = [_close(text, spans, tokenizer, special) for text, spans in rendered]
        for one, (_, spans), (ids, labels) in zip(
            batch, closed, _tokenise(closed, tokenizer), strict=True
        ):
            num_answers = sum(message.role == "assistant" for message in one.messages)
            yield _cut(ids, labels, max_length, is_last_answer_only=len(spans) < num_answers)


def _cut(
    ids: list[int], labels: list[int], max_length: int, *, is_last_answer_only: bool
) -> Encoded:
    num_prompt_tokens = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
    return Encoded(
        ids[:max_length], labels[:max_length], len(ids), num_prompt_tokens, is_last_answer_only
    )


def _encode_texts(
    batch: Sequence[Conversation],
    tokenizer: "transformers.PreTrainedTokenizerBase",
    max_length: int,
) -> Iterator[Encoded]:
    """Plain text as the tokenizer takes it, plus the end-of-sequence token if there is one."""
    texts = [one.text or "" for one in batch]
    eos = tokenizer.eos_token_id
    for ids in tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]:
        whole = ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
        yield _cut(whole, list(whole), max_length, is_last_answer_only=False)


def _puts_start_token(tokenizer: "transformers.PreTrainedTokenizerBase") -> bool:
    start = tokenizer.bos_token_id
    return start is not None and tokenizer.encode("a")[:1] == [start]


def _special_tokens(tokenizer: "transformers.PreTrainedTokenizerBase") -> str:
    """A pattern for any one special token, or one that never matches."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return "|".join(re.escape(token) for token in found) or "(?!)"


def render(
    messages: Sequence[Message],
    tokenizer: "transformers.PreTrainedTokenizerBase",
    template: ChatTemplate,
    *,
    prompt: bool = False,
) -> tuple[str, list[_Span]]:
    """The text that `apply_chat_template` makes, and the spans inside generation markers."""
    # `apply_chat_template` gives marked spans in tokens only, and loses or overruns those that
    # begin or end with a character that no token holds, so this calls what it calls.
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
    # A template is a program: besides Jinja's own errors it fails with those of Python's operators.
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"The chat template {template.name!r} must render every conversation, it failed with: "
            f"{reason}; mend the template or choose another `--chat-template`."
        ) from error
    return texts[0], [tuple(span) for span in spans[0]] if spans else []


def _locate(
    messages: Sequence[Message],
    tokenizer: "transformers.PreTrainedTokenizerBase",
    template: ChatTemplate,
) -> tuple[str, list[_Span]]:
    """The rendered conversation and the spans of its answers, of which the last is certain."""
    text, spans = render(messages, tokenizer, template)
    advice = "mend the template or choose another `--chat-template`."
    if not text.strip():
        raise DataError(
            f"The chat template {template.name!r} must render every conversation, "
            f"it rendered nothing; {advice}"
        )
    answer = messages[-1].content.strip()
    if answer not in text:
        raise DataError(
            f"The chat template {template.name!r} must render the whole answer, "
            f"it lost {answer[:60]!r}; {advice}"
        )
    if not template.has_markers:
        spans = _prefix_spans(messages, tokenizer, template, text)
    if not spans or answer not in text[slice(*spans[-1])]:
        raise DataError(
            f"The chat template {template.name!r} must show where the answer {answer[:60]!r} is, "
            "by `{% generation %}` markers around it or by rendering the turns before it the same "
            f"with and without it; {advice}"
        )
    return text, spans


def _prefix_spans(
    messages: Sequence[Message],
    tokenizer: "transformers.PreTrainedTokenizerBase",
    template: ChatTemplate,
    text: str,
) -> list[_Span]:
    """The spans of all answers, of the last one if earlier ones change later, or none."""
    spans: list[_Span | None] = []
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        try:
            before, _ = render(messages[:i], tokenizer, template, prompt=True)
            after = text
            if i + 1 < len(messages):
                after, _ = render(messages[: i + 1], tokenizer, template)
        except (
            DataError
        ):  # the whole conversation rendered, but the template refuses this part of it
            spans.append(None)
            continue
        holds = after.startswith(before) and text.startswith(after)
        spans.append((len(before), len(after)) if holds else None)
    known = [span for span in spans if span is not None]
    return known if len(known) == len(spans) else [span for span in spans[-1:] if span is not None]


def _close(
    text: str,
    spans: list[_Span],
    tokenizer: "transformers.PreTrainedTokenizerBase",
    special: str,
) -> tuple[str, list[_Span]]:
    """The text and spans, such that the last answer ends with a token that says stop."""
    start, end = spans[-1]
    if re.search(rf"(?:{special})\s*\Z", text[start:end]):
        return text, spans
    if closing := re.match(rf"\s*(?:{special})", text[end:]):
        # The markers leave out the closing token; it follows earlier answers too.
        mark = closing.group()
        return text, [(a, b + len(mark) if text.startswith(mark, b) else b) for a, b in spans]
    if tokenizer.eos_token is None:
        raise DataError(
            "An answer must end with a token that says stop, but neither the chat template nor the "
            "tokenizer has one; set the tokenizer's `eos_token`."
        )
    eos: str = tokenizer.eos_token
    return text[:end] + eos, [*spans[:-1], (start, end + len(eos))]


def _tokenise(
    closed: Sequence[tuple[str, list[_Span]]], tokenizer: "transformers.PreTrainedTokenizerBase"
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids and labels of every text, given the spans of its answers."""
    if not tokenizer.is_fast:
        for text, spans in closed:
            yield _tokenise_pieces(text, spans, tokenizer)
        return
    # The rendered text holds all special tokens already; adding them would double the first.
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

    A token with equal offsets holds the blank just before them: tokenizers of the GPT-2 kind leave
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
    text: str, spans: Sequence[_Span], tokenizer: "transformers.PreTrainedTokenizerBase"
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
