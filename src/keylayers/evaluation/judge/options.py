# SPDX-License-Identifier: Apache-2.0
"""Which models are judged, on which questions, and by whom."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from keylayers.errors import ConfigError
from keylayers.model.options import Dtype, ModelOptions
from keylayers.ranges import check_above_zero, check_at_least, check_seed

JudgeMode = Literal["single", "pairwise"]
LimitField = Literal["max_tokens", "max_completion_tokens"]

KEY_VARIABLE = "OPENAI_API_KEY"
MAX_URL = 2000  # characters
# As MT-Bench has them, from memory of FastChat's code; what is not named there is sampled at 0.7.
CATEGORY_TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
OTHER_TEMPERATURE = 0.7


@dataclass(frozen=True, kw_only=True)
class JudgedOptions:
    """Which models are judged: a base, adapters of it, other checkpoints.

    Attributes:
        model: Folder of the base model, or its name on the hub.
        revision: Branch, tag or commit of the base model on the hub.
        adapter: PEFT adapters of the model, folders or hub names.
        checkpoint: Further models as whole checkpoints, folders or hub names.
        base: Judge the base model too. The others are shown beside it, else beside the first of
            them.
        dtype: Of the weights; auto is float32 on a CPU and bfloat16 on an accelerator.
        load_in_4bit: Load the base weights in 4 bits (NF4, double quantisation), as QLoRA does.
            Needs bitsandbytes.
        trust_remote_code: Run Python code that comes with the models. Off: nothing of it is
            executed.
    """

    model: str
    revision: str | None = None
    adapter: tuple[str, ...] = ()
    checkpoint: tuple[str, ...] = ()
    base: bool = True
    dtype: Dtype = "auto"
    load_in_4bit: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.base and not self.adapter and not self.checkpoint:
            raise ConfigError(
                "there must be a model to judge: give `adapter` or `checkpoint`, or leave out "
                "`no-base`"
            )
        if self.load_in_4bit and self.checkpoint:
            raise ConfigError(
                "`load_in_4bit` must be left out with `checkpoint`: only the base of adapters is "
                "loaded in 4 bits"
            )

    def source(self, checkpoint: str | None = None) -> ModelOptions:
        """How the base is loaded, or one of the checkpoints."""
        is_base = checkpoint is None
        return ModelOptions(
            model=self.model if checkpoint is None else checkpoint,
            revision=self.revision if is_base else None,
            dtype=self.dtype,
            load_in_4bit=self.load_in_4bit and is_base,
            trust_remote_code=self.trust_remote_code,
        )


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """What is asked, and how the models answer.

    Attributes:
        questions: JSON lines in FastChat's format (question_id, category, turns), or mt-bench for
            MT-Bench's 80 from the hub.
        references: JSON lines in FastChat's format with reference answers, shown to the judge
            with the questions that they are for.
        max_questions: Ask only the first so many questions of each category.
        chat_template: chatml, alpaca, or a Jinja file, for all models. Not given: each one's own,
            else alpaca.
        temperature: Of all answers. Not given: by category as in MT-Bench, 0.7 for writing and
            roleplay, 0.1 for stem and humanities, 0 for extraction, math, coding and reasoning;
            0.7 for others.
        max_new_tokens: Longest answer to one turn, in tokens; what is longer loses its end.
        answer_batch_size: Questions answered at once.
        answer_seed: Of the sampling of answers.
    """

    questions: str
    references: str | None = None
    max_questions: int | None = None
    chat_template: str | None = None
    temperature: float | None = None
    max_new_tokens: int = 1024  # as in MT-Bench, from memory of FastChat's code
    answer_batch_size: int = 8
    answer_seed: int = 0

    def __post_init__(self) -> None:
        if self.max_questions is not None:
            check_at_least("max_questions", self.max_questions, 1)
        if self.temperature is not None:
            _check_zero_or_above("temperature", self.temperature)
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        check_at_least("answer_batch_size", self.answer_batch_size, 1)
        check_seed("answer_seed", self.answer_seed)

    def temperature_of(self, category: str) -> float:
        """The temperature at which questions of a category are answered."""
        if self.temperature is not None:
            return self.temperature
        return CATEGORY_TEMPERATURES.get(category, OTHER_TEMPERATURE)


@dataclass(frozen=True, kw_only=True)
class EndpointOptions:
    """Who judges: a model behind an endpoint that speaks OpenAI's protocol for chats.

    Attributes:
        judge_url: Address of the endpoint, such as https://api.openai.com/v1 or
            http://localhost:8000.
        judge_model: The judge's name there.
        judge_key_variable: Environment variable that holds the key. Keys are taken from nowhere
            else and never written.
        mode: Rate each answer from 1 to 10 (single), or compare it with the first model's in both
            orders (pairwise).
        judge_temperature: Of the judge; none leaves it to the endpoint.
        judge_max_tokens: Longest reply of the judge, in tokens.
        judge_limit_field: What the endpoint calls that limit.
        judge_requests_at_once: Requests under way at the same time.
        judge_retries: How often a request is tried again, waiting longer each time, where the
            endpoint is busy, silent or broken.
        judge_timeout_seconds: How long one try may take.
        judge_price_input: Price of a million prompt tokens, to estimate the cost.
        judge_price_output: Price of a million tokens that the judge writes.
    """

    judge_url: str
    judge_model: str
    judge_key_variable: str = KEY_VARIABLE
    mode: JudgeMode = "single"
    judge_temperature: float | None = 0.0
    judge_max_tokens: int = 2048
    judge_limit_field: LimitField = "max_tokens"
    judge_requests_at_once: int = 4
    judge_retries: int = 5
    judge_timeout_seconds: float = 300.0
    judge_price_input: float | None = None
    judge_price_output: float | None = None

    def __post_init__(self) -> None:
        _check_url(self.judge_url)
        if not self.judge_model.strip():
            raise ConfigError("`judge_model` must be the judge's name at the endpoint, got none")
        if self.judge_temperature is not None:
            _check_zero_or_above("judge_temperature", self.judge_temperature)
        check_at_least("judge_max_tokens", self.judge_max_tokens, 1)
        check_at_least("judge_requests_at_once", self.judge_requests_at_once, 1)
        check_at_least("judge_retries", self.judge_retries, 0)
        check_above_zero("judge_timeout_seconds", self.judge_timeout_seconds)
        for name in ("judge_price_input", "judge_price_output"):
            if (price := getattr(self, name)) is not None:
                _check_zero_or_above(name, price)
        if (self.judge_price_input is None) != (self.judge_price_output is None):
            raise ConfigError(
                "`judge_price_input` and `judge_price_output` must be given together, got one"
            )

    @property
    def base_url(self) -> str:
        """What `/chat/completions` is added to; an address without a path gets `/v1`."""
        url = self.judge_url.rstrip("/").removesuffix("/chat/completions")
        return url if urlsplit(url).path else f"{url}/v1"


@dataclass(frozen=True)
class JudgeOptions:
    """All options of one run of `keylayers judge`."""

    judged: JudgedOptions
    answers: AnswerOptions
    endpoint: EndpointOptions

    def __post_init__(self) -> None:
        judged = self.judged
        num_models = judged.base + len(judged.adapter) + len(judged.checkpoint)
        if self.endpoint.mode == "pairwise" and num_models < 2:
            raise ConfigError(
                "`mode` pairwise must have two models or more to compare, got one; give `adapter` "
                "or `checkpoint`"
            )

    def flat(self) -> dict[str, Any]:
        """Every option by the name of its flag, for the record; no key is among them."""
        parts = (self.judged, self.answers, self.endpoint)
        return {name: value for part in parts for name, value in asdict(part).items()}


def _check_zero_or_above(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ConfigError(f"`{name}` must be 0 or more and finite, got {value}")


def _check_url(url: str) -> None:
    """Refuse what is no address, and secrets inside one; the message must not hold these."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna")  # refuses parts that are empty or too long
        is_address = parts.scheme in ("http", "https") and bool(host) and parts.port != 0
    except ValueError:  # a port that is no number, or brackets that do not close
        is_address = False
    if not is_address or not url.isprintable() or " " in url or len(url) > MAX_URL:
        raise ConfigError(
            "`judge_url` must be an address such as https://api.openai.com/v1 or "
            "http://localhost:8000, got something else"
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            "`judge_url` must hold no user, password or query, for it is recorded; give the key "
            "in the environment variable that `judge_key_variable` names"
        )
