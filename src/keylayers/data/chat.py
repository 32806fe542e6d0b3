# SPDX-License-Identifier: Apache-2.0
"""Conversations rendered by a chat template and tokenised, with the loss on the answers only.

The whole conversation is rendered as one text and tokenised once, so token boundaries are the same
as when the model is used. The template's `{% generation %}` markers say which characters are
answers; without markers, rendering turn by turn does. Offsets carry that over to tokens.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from keylayers.data.formats import Conversation
from keylayers.data.preferences import Preference
from keylayers.data.turns import Message
from keylayers.errors import ConfigError, DataError, did_you_mean
from keylayers.model.options import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that cross-entropy skips
ADDED_TOKENS = 2  # ORPO's trainer (TRL 1.16) adds a start and an end token where they are missing
_BATCH_SIZE = 512  # conversations; bounds the memory that offsets take
THOUGHT_END = "</think>"
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
class Example:
    """What a trainer gets of one example, and what the cut to `max_length` tokens leaves of it."""

    row: dict[str, Any]  # the columns that the objective's trainer in TRL takes
    num_prompt_tokens: int  # before the first one that the loss counts, before the cut
    num_used_tokens: int  # after the cut; a pair has two sequences
    num_label_tokens: int  # that the loss counts, after the cut
    is_truncated: bool  # the end was cut off
    is_usable: bool  # something is left to learn
    is_last_answer_only: bool = False  # the template hides earlier answers, so the loss does too
    is_thought_lost: bool = False  # the template leaves out the last answer's <think> part
    max_id: int = 0  # the highest token


def resolve_template(tokenizer: "PreTrainedTokenizerBase", choice: str | None) -> ChatTemplate:
    """A built-in template or a Jinja file; by default the tokenizer's own, or else "alpaca"."""
    if choice is None and tokenizer.chat_template:
        try:
            return ChatTemplate("model", _training_template(tokenizer), "model")
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


def _training_template(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The tokenizer's own template, or TRL's form of it that marks the answers.

    Many templates render earlier answers in another way once there are later turns, or write part
    of an answer into the generation prompt, so nothing but marks can say where answers are.
    """
    own = tokenizer.get_chat_template()
    if _MARKER.search(own):
        return own
    from jinja2 import TemplateError
    from trl.chat_template_utils import get_training_chat_template

    try:
        return get_training_chat_template(tokenizer) or own
    except (ValueError, TypeError, TemplateError):  # TRL has none, or cannot try this one out
        return own


def _as_parts(messages: list[Message]) -> list[Message]:
    """The turns with their text as parts, as templates of vision-language models want it."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]


@dataclass(frozen=True)
class _Renderer:
    """A template with the tokenizer whose special tokens it writes."""

    template: ChatTemplate
    tokenizer: "PreTrainedTokenizerBase"

    @cached_property
    def wants_parts(self) -> bool:
        """Whether the template loses content that is text, and renders it as parts."""
        probe: list[Message] = [
            {"role": role, "content": f"probe {role}"} for role in ("user", "assistant")
        ]
        for messages in (probe, _as_parts(probe)):
            with suppress(DataError):
                if "probe assistant" in self._render(messages)[0]:
                    return messages is not probe
        return False

    def render(
        self, messages: list[Message], *, prompt: bool = False, tools: Any = None
    ) -> tuple[str, list[_Span]]:
        """The text that `apply_chat_template` makes, and the spans inside generation markers."""
        messages = _as_parts(messages) if self.wants_parts else messages
        text, spans = self._render(messages, prompt=prompt, tools=tools)
        joined: list[_Span] = []
        for start, end in spans:  # some templates mark an answer and its end apart
            if joined and joined[-1][1] == start:
                start = joined.pop()[0]
            joined.append((start, end))
        return text, joined

    def _render(
        self, messages: list[Message], *, prompt: bool = False, tools: Any = None
    ) -> tuple[str, list[_Span]]:
        # transformers 5.23: `apply_chat_template` returns the marked spans as tokens, and loses or
        # overruns spans that begin or end with a character outside all tokens. The function below,
        # which it calls, returns characters.
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        # A template is a program, so it can also fail with the errors of Python's operators.
        python_errors = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.template.text,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self.template.has_markers,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, *python_errors) as error:
            reason = " ".join(str(error).split())[:200]
            raise self.error(f"render every conversation, it failed with: {reason}") from error
        return texts[0], [tuple(span) for span in spans[0]] if spans else []

    def answers(self, conversation: Conversation) -> tuple[str, list[_Span]]:
        """The rendered conversation and the spans of its answers, at least that of the last one."""
        messages, tools = conversation.messages, conversation.tools
        text, spans = self.render(messages, tools=tools)
        # Templates write a thought in their own form, move it, or leave it out.
        answer = messages[-1]["content"].rpartition(THOUGHT_END)[2].strip()
        if not text.strip():
            raise self.error("render every conversation, it rendered nothing")
        if answer not in text:
            raise self.error(f"render the whole answer, it lost {answer[:60]!r}")
        if not self.template.has_markers:
            spans = self._spans_by_turns(messages, tools, text)
        if not spans or answer not in text[slice(*spans[-1])]:
            raise self.error(
                f"show where the answer {answer[:60]!r} is, by `{{% generation %}}` markers around "
                "it or by rendering the turns before it the same with and without it"
            )
        return text, spans

    def _spans_by_turns(self, messages: list[Message], tools: Any, text: str) -> list[_Span]:
        """The spans of all answers; only the last if later turns change how others are rendered."""

        def span(end: int) -> _Span | None:
            is_whole = end == len(messages)
            try:
                before, _ = self.render(messages[: end - 1], prompt=True, tools=tools)
                after = text if is_whole else self.render(messages[:end], tools=tools)[0]
            except DataError:  # the template renders the whole conversation but refuses this part
                return None
            is_prefix = after.startswith(before) and text.startswith(after)
            return (len(before), len(after)) if is_prefix else None

        ends = [end for end, turn in enumerate(messages, 1) if turn["role"] == "assistant"]
        spans = [span(end) for end in ends]
        return [found for found in (spans[-1:] if None in spans else spans) if found is not None]

    def error(self, must: str) -> DataError:
        """The error about a conversation that the template does not render as it must."""
        return DataError(
            f"The chat template {self.template.name!r} must {must}; fix the template, or choose "
            f"another `--chat-template`: {' or '.join(BUILT_IN)} take any conversation."
        )


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
        for ids, labels, is_last_answer_only, is_thought_lost in tokens:
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
                is_thought_lost=is_thought_lost,
                max_id=max(ids[:max_length]),
            )


# ids, labels, is_last_answer_only, is_thought_lost
_Tokens = Iterator[tuple[list[int], list[int], bool, bool]]


def _encode_texts(batch: Sequence[Conversation], tokenizer: "PreTrainedTokenizerBase") -> _Tokens:
    """Plain text as the tokenizer takes it, plus the end-of-sequence token if there is one."""
    texts = [conversation.text or "" for conversation in batch]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for ids in tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]:
        if bos is not None and ids[:2] == [bos, bos]:  # the text has one, the tokenizer adds one
            ids = ids[1:]
        whole = ids if eos is None or ids[-1:] == [eos] else [*ids, eos]
        first = [IGNORED] if whole[:1] == [bos] else whole[:1]
        yield whole, [*first, *whole[1:]], False, False


def _encode_chats(
    batch: Sequence[Conversation], tokenizer: "PreTrainedTokenizerBase", template: ChatTemplate
) -> _Tokens:
    renderer, special = _Renderer(template, tokenizer), _special_tokens(tokenizer)
    rendered = [_answers(renderer, conversation) for conversation in batch]
    whole = [_close(text, spans, tokenizer, special) for text, spans in rendered]
    closed = [
        (text, _learned(spans, conversation.messages))
        for (text, spans), conversation in zip(whole, batch, strict=True)
    ]
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
    for conversation, (text, spans), (ids, labels) in zip(batch, whole, tokenised, strict=True):
        roles = [message["role"] for message in conversation.messages]
        is_lost = thought_of(conversation.messages[-1]) not in text[slice(*spans[-1])]
        yield ids, labels, len(spans) < roles.count("assistant"), is_lost


def _answers(renderer: _Renderer, conversation: Conversation) -> tuple[str, list[_Span]]:
    try:
        return renderer.answers(conversation)
    except DataError as error:
        raise DataError(f"Row {conversation.row_number}: {error}") from error


def _learned(spans: list[_Span], messages: list[Message]) -> list[_Span]:
    """The spans of answers to learn; the last answer is one of them."""
    answers = [message for message in messages if message["role"] == "assistant"]
    is_learned = [turn.get("weight") != 0 for turn in answers]
    if len(spans) == len(answers):
        return [span for span, taken in zip(spans, is_learned, strict=True) if taken]
    return spans if all(is_learned) else spans[-1:]


def thought_of(message: Message) -> str:
    """What an answer thinks before it says something, if it is written into the answer."""
    before, end, _ = message["content"].rpartition(THOUGHT_END)
    return before.replace("<think>", "").strip() if end else ""


def _special_tokens(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A pattern that matches any special token; without special tokens it never matches."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    found = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return "|".join(re.escape(token) for token in found) or "(?!)"


def _close(
    text: str, spans: list[_Span], tokenizer: "PreTrainedTokenizerBase", special: str
) -> tuple[str, list[_Span]]:
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
    ids: Sequence[int], offsets: Sequence[_Span], text: str, spans: Sequence[_Span]
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
    text: str, spans: Sequence[_Span], tokenizer: "PreTrainedTokenizerBase"
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
    renderer = _Renderer(template, tokenizer)

    def ids_of(messages: list[Message], *, prompt: bool = False) -> list[int]:
        text, _ = renderer.render(messages, prompt=prompt)
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    for preference in preferences:
        try:
            num_prompt_tokens = len(ids_of(preference.prompt, prompt=True))
            both = [ids_of(preference.prompt + answer) for answer in preference.answers]
        except DataError as error:
            raise DataError(f"Row {preference.row_number}: {error}") from error
        whole = [len(ids) for ids in both]
        cut = [min(num_tokens, max_length) for num_tokens in whole]
        is_truncated = cut != whole
        has_room = num_prompt_tokens + ADDED_TOKENS <= max_length
        yield Example(
            row=preference.row(),
            num_prompt_tokens=num_prompt_tokens,
            num_used_tokens=sum(cut),
            num_label_tokens=sum(max(0, num - num_prompt_tokens) for num in cut),
            is_truncated=is_truncated,
            # A reward model must see both answers whole.
            is_usable=not is_truncated if objective == "reward" else has_room,
            max_id=max(max(ids, default=0) for ids in both),
        )
