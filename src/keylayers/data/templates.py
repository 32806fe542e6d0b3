# SPDX-License-Identifier: Apache-2.0
"""Chat templates: which one is used, what it renders, and where the answers are in its text.

A template's `{% generation %}` markers say which characters are answers; without markers, rendering
turn by turn does.
"""

import re
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import get_training_chat_template

from keylayers.data.formats import Conversation
from keylayers.data.turns import Message, is_learned
from keylayers.errors import ConfigError, DataError, did_you_mean

THOUGHT_END = "</think>"
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")

# transformers 5.23 gives a thought that has one of these names the names of the first two as well.
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
_PROBE = "\u2063"  # an invisible character, no blank, that templates leave where it is

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

Span = tuple[int, int]  # first character, and the one after the last
# A template is a program, so it can also fail with the errors of Python's operators.
_PYTHON_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


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

    def reads(self, field: str) -> bool:
        """Whether the template has the field of a turn as an attribute or a key."""
        names = {field, *_THOUGHTS[:2]} if field in _THOUGHTS else {field}
        either = "|".join(map(re.escape, sorted(names)))
        return re.search(rf"\.(?:{either})\b|['\"](?:{either})['\"]", self.text) is not None


def resolve_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> ChatTemplate:
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


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The tokenizer's own template, or TRL's form of it that marks the answers.

    Many templates render an answer in another way once there are later turns, or write part of it
    into the generation prompt. Only marks show such answers.
    """
    own = tokenizer.get_chat_template()
    if _MARKER.search(own):
        return own
    try:
        return get_training_chat_template(tokenizer) or own
    except (TemplateError, *_PYTHON_ERRORS):  # TRL has none, or cannot try this one out
        return own


def _as_parts(messages: list[Message]) -> list[Message]:
    """The turns with their text as parts, as templates of vision-language models want it."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in messages
    ]


def _joined(spans: list[Span]) -> list[Span]:
    """Without gaps: some templates mark an answer and its end apart."""
    joined: list[Span] = []
    for start, end in spans:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, end))
    return joined


def _said(message: Message) -> str:
    """What a turn says after its thought; templates write a thought in another form, or not."""
    said: str = message["content"].rpartition(THOUGHT_END)[2]
    return said.strip()


def _probed(message: Message) -> Message:
    """The turn with a character more at the end of what it says, or else of its first call."""
    if message["content"].strip() or not message.get("tool_calls"):
        return {**message, "content": message["content"] + _PROBE}
    first, *others = message["tool_calls"]
    function = {**first["function"], "name": first["function"]["name"] + _PROBE}
    return {**message, "tool_calls": [{**first, "function": function}, *others]}


@dataclass(frozen=True)
class Renderer:
    """A template with the tokenizer whose special tokens it writes."""

    template: ChatTemplate
    tokenizer: PreTrainedTokenizerBase

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
    ) -> tuple[str, list[Span]]:
        """The text that `apply_chat_template` makes, and the spans inside generation markers."""
        return self._render(self.in_form(messages), prompt=prompt, tools=tools)

    def in_form(self, messages: list[Message]) -> list[Message]:
        """The turns with their content as the template takes it."""
        return _as_parts(messages) if self.wants_parts else messages

    def _render(
        self, messages: list[Message], *, prompt: bool = False, tools: Any = None
    ) -> tuple[str, list[Span]]:
        # transformers 5.23: `apply_chat_template` returns the marked spans as tokens, and loses or
        # overruns spans that begin or end with a character outside all tokens. The function below,
        # which it calls, returns characters.
        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=self.template.text,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self.template.has_markers,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, *_PYTHON_ERRORS) as error:
            reason = " ".join(str(error).split())[:200]
            raise self.error(f"render every conversation, it failed with: {reason}") from error
        return texts[0], [tuple(span) for span in spans[0]] if spans else []

    def answers(self, conversation: Conversation) -> tuple[str, list[Span], bool]:
        """The rendered conversation, its answers to learn, and whether it hides earlier ones."""
        messages, tools = conversation.messages, conversation.tools
        answers = [turn for turn in messages if turn["role"] == "assistant"]
        text, spans = self.render(messages, tools=tools)
        self.check_answer(messages, text)
        if not self.template.has_markers:
            spans = self._spans_by_turns(messages, tools, text)
        learns_last_only = len(spans) < len(answers)
        if not all(map(is_learned, answers)):
            owners = self._owners(messages, tools, text, spans)
            spans = [span for span, turn in zip(spans, owners, strict=True) if is_learned(turn)]
        spans = _joined(spans)
        answer = _said(messages[-1])
        if not spans or answer not in text[slice(*spans[-1])]:
            raise self.error(
                f"show where the answer {answer[:60]!r} is, by `{{% generation %}}` markers around "
                "it or by rendering the turns before it the same with and without it"
            )
        learned = text if learns_last_only else "".join(text[slice(*span)] for span in spans)
        for turn in answers:
            for call in turn.get("tool_calls", ()):
                name = call["function"]["name"]
                if name not in (learned if is_learned(turn) else text):
                    raise DataError(
                        f"The chat template {self.template.name!r} must render every call of a "
                        f"tool, it lost that of {name!r}; choose another `--chat-template`, or "
                        "remove such rows."
                    )
        return text, spans, learns_last_only

    def check_answer(self, messages: list[Message], text: str) -> None:
        """Refuse a rendered conversation without its last answer."""
        if not text.strip():
            raise self.error("render every conversation, it rendered nothing")
        if (answer := _said(messages[-1])) not in text:
            raise self.error(f"render the whole answer, it lost {answer[:60]!r}")

    def num_lost(self, messages: list[Message], text: str) -> int:
        """How many of the answers to learn lack their thought or what they say in the text."""
        names = [name for name in _THOUGHTS if self.template.reads(name)]
        num_lost = 0
        for turn in filter(is_learned, messages):
            thought, _, said = turn["content"].rpartition(THOUGHT_END)
            parts = [said, thought.replace("<think>", ""), *(turn.get(name, "") for name in names)]
            num_lost += any(str(part).strip() not in text for part in parts)
        return num_lost

    def _owners(
        self, messages: list[Message], tools: Any, text: str, spans: list[Span]
    ) -> list[Message]:
        """The turn of each span: a character more in a turn shows where in the text it is.

        Templates mark parts of a turn apart, or turns of an answer as one.
        """
        if not self.template.has_markers:
            answers = [turn for turn in messages if turn["role"] == "assistant"]
            return answers[len(answers) - len(spans) :]
        places: list[tuple[int, Message]] = []
        for index, turn in enumerate(messages):
            if turn["role"] == "assistant":
                changed = [*messages[:index], _probed(turn), *messages[index + 1 :]]
                other, _ = self.render(changed, tools=tools)
                both = enumerate(zip(text, other, strict=False))
                place = next((place for place, (own, new) in both if own != new), len(text))
                if other != text:
                    places.append((place, turn))

        def owner(start: int, end: int) -> Message:
            inside = [turn for place, turn in places if start < place <= end]
            after = [turn for place, turn in places if start <= place]
            return (inside or after or [messages[-1]])[0]

        return [owner(*span) for span in spans]

    def _spans_by_turns(self, messages: list[Message], tools: Any, text: str) -> list[Span]:
        """The spans of all answers; only the last if later turns change how others are rendered."""

        def span(end: int) -> Span | None:
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
            f"another `--chat-template`: {' or '.join(BUILT_IN)} take any conversation without "
            "tools."
        )
