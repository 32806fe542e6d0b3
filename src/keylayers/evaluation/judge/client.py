# SPDX-License-Identifier: Apache-2.0
"""The judge's endpoint, through openai's client: one prompt in, one reply out, or why not.

The client tries again, waiting longer each time, where the endpoint cannot be reached, is busy
(429) or breaks down (5xx). What then still fails is of two kinds. `JudgeError`: the endpoint as a
whole cannot be used, so the run stops. `Refused`: it refuses this one prompt, such as one that is
too long for the judge, and the run goes on without. Needs no torch.
"""

import os
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from keylayers.errors import ConfigError, JudgeError
from keylayers.evaluation.judge.options import KEY_VARIABLE, EndpointOptions

if TYPE_CHECKING:
    import openai

MAX_REPLY_BYTES = 4 * 2**20  # of one reply; the longest that a judge is allowed are far below
REACH_SECONDS = 10.0  # to see whether anything is there
_NO_KEY = "no-key"  # servers of one's own ask for none, but the client wants a word
_OF_ONE_PROMPT = (400, 403, 413, 422, 500)  # statuses that may be about the prompt alone
_ABOUT_THE_KEY = (401, 403)  # whose words may be "Incorrect API key provided: sk-****1234"


class Refused(Exception):
    """The endpoint gave no reply to one prompt, which may be the prompt's fault."""


@dataclass(frozen=True)
class Reply:
    """What the judge said.

    Attributes:
        text: Its words; empty if it said nothing.
        finish_reason: Why it stopped, as the endpoint calls it.
        prompt_tokens: As the endpoint counts them, if it does.
        completion_tokens: The same of the reply.
    """

    text: str
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None

    @property
    def is_cut(self) -> bool:
        """Whether it ended at the limit, in the middle of what the judge had to say."""
        return self.finish_reason == "length"


class JudgeClient:
    """Asks the judge; several threads may do so at once.

    Args:
        options: Where it is and how it is asked.

    Raises:
        ConfigError: openai's client is not installed, or the key is missing or none.
    """

    def __init__(self, options: EndpointOptions) -> None:
        try:
            import httpx2  # the client's own
            import openai
        except ImportError as error:
            raise ConfigError(
                "`keylayers judge` needs openai's client, which is not installed; "
                "`pip install 'keylayers[judge]'`"
            ) from error
        self._options = options
        self._key = _key(options.judge_key_variable)
        self._library = openai
        # Redirects are not followed: they would turn the request into another and may take the key
        # to another place.
        http = openai.DefaultHttpxClient(
            follow_redirects=False, event_hooks={"response": [self._refuse_huge]}
        )
        try:
            self._client = openai.OpenAI(
                api_key=self._key or _NO_KEY,
                base_url=options.base_url,
                max_retries=options.judge_retries,
                timeout=options.judge_timeout_seconds,
                http_client=http,
            )
        except httpx2.InvalidURL as error:
            raise ConfigError(
                f"`judge_url` must be an address that can be used: {error}"
            ) from error

    def __enter__(self) -> "JudgeClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._client.close()

    def ask(self, prompt: str) -> Reply:
        """The judge's reply.

        Raises:
            Refused: no reply to this prompt.
            JudgeError: the endpoint cannot be used, or gave up after all retries.
        """
        options, openai = self._options, self._library
        extra: dict[str, Any] = {options.judge_limit_field: options.judge_max_tokens}
        if options.judge_temperature is not None:
            extra["temperature"] = options.judge_temperature
        try:
            found: object = self._client.chat.completions.create(
                model=options.judge_model,
                messages=[{"role": "user", "content": prompt}],
                **extra,
            )
        except openai.APITimeoutError as error:
            raise JudgeError(
                self._line(
                    f"did not answer within {options.judge_timeout_seconds:g} s, in "
                    f"{options.judge_retries + 1} tries; raise `judge_timeout_seconds` or lower "
                    f"`judge_requests_at_once`"
                )
            ) from error
        except openai.APIConnectionError as error:
            raise JudgeError(
                self._line(
                    f"cannot be reached: {self._without_key(_cause(error))}; start it, or mend "
                    f"`judge_url`"
                )
            ) from error
        # From None: what these hold is the endpoint's, and `--traceback` would show it as it is.
        except openai.APIStatusError as error:
            raise self._status_error(error) from None
        except (openai.OpenAIError, ValueError) as error:  # JSON that is none is a ValueError
            reason = self._without_key(" ".join(str(error).split()))[:200]
            raise JudgeError(self._line(f"answered with what cannot be read: {reason}")) from None
        return self._reply(found)

    def why_unreachable(self) -> str | None:
        """Why the endpoint cannot be reached right now; None if anything answers there."""
        patient_once = self._client.with_options(max_retries=0, timeout=REACH_SECONDS)
        try:
            patient_once.models.list()
        except self._library.APIConnectionError as error:  # a timeout is one
            return self._without_key(_cause(error))
        except (self._library.OpenAIError, JudgeError, ValueError):
            return None  # not every server lists its models
        return None

    def _reply(self, found: object) -> Reply:
        """The first choice of a chat completion, of which the client has checked nothing."""
        from openai.types.chat import ChatCompletion

        if not isinstance(found, ChatCompletion):
            what = "a page that is no JSON" if isinstance(found, str) else "something else"
            raise JudgeError(
                self._line(f"answered with {what}; mend `judge_url`, which often ends in /v1")
            )
        choices: Any = found.choices
        if not isinstance(choices, list) or not choices:
            raise Refused("the reply holds no choices")
        message: Any = getattr(choices[0], "message", None)
        text: Any = getattr(message, "content", None) or ""
        if not isinstance(text, str):
            raise Refused("the reply's content is no text")
        if len(text) > MAX_REPLY_BYTES:  # of a reply that did not say how long it is
            raise Refused(f"the reply has {len(text):,} characters")
        usage: Any = found.usage
        reason: Any = getattr(choices[0], "finish_reason", None)
        return Reply(
            text=self._clean(text),
            finish_reason=self._clean(reason)[:100] if isinstance(reason, str) else None,
            prompt_tokens=_count(usage, "prompt_tokens"),
            completion_tokens=_count(usage, "completion_tokens"),
        )

    def _refuse_huge(self, response: Any) -> None:
        """Look at the size that a reply says it has before any of it is read."""
        size = response.headers.get("content-length", "0")
        if size.isdecimal() and int(size) > MAX_REPLY_BYTES:
            raise JudgeError(
                self._line(
                    f"its reply has {int(size):,} bytes, more than {MAX_REPLY_BYTES // 2**20} MiB; "
                    f"mend `judge_url`"
                )
            )

    def _status_error(self, error: "openai.APIStatusError") -> Exception:
        status, said = error.status_code, self._said(error)
        if status in _OF_ONE_PROMPT:
            return Refused(f"HTTP {status}: {said}")
        variable = self._options.judge_key_variable
        told = {
            401: f"refused the key in {variable} (HTTP 401); set one that it takes"
            if self._key
            else f"wants a key (HTTP 401); set {variable}",
            402: f"wants to be paid (HTTP 402: {said})",
            404: f"knows no such place or model (HTTP 404: {said}); mend `judge_url`, which often "
            f"ends in /v1, or `judge_model`",
            429: f"was too busy in all {self._options.judge_retries + 1} tries, or a quota is used "
            f"up (HTTP 429: {said}); lower `judge_requests_at_once`, or wait",
        }
        if 300 <= status < 400:
            place = self._without_key(error.response.headers.get("location", ""))
            told[status] = f"is at another address, {place!r} (HTTP {status}); give that one"
        return JudgeError(self._line(told.get(status, f"answered HTTP {status}: {said}")))

    def _line(self, what: str) -> str:
        return f"the judge at {self._options.base_url} must answer chats, but {what}"

    def _said(self, error: "openai.APIStatusError") -> str:
        """The endpoint's own words, in one line and not many of them."""
        if error.status_code in _ABOUT_THE_KEY:
            return "its words are not shown, for they may hold a part of the key"
        body: Any = error.body
        if isinstance(body, dict):
            body = body.get("message") or body.get("detail") or body.get("error") or body
        if not body:
            body = error.response.text
        # Before it is cut or quoted, for a part of the key is not found afterwards.
        text = self._without_key(" ".join(str(body).split()))
        if text.lstrip().startswith("<"):
            return "a web page"
        return repr(text[:300]) if text else "no reason given"

    def _clean(self, text: str) -> str:
        """Whole characters, for JSON can hold halves of them, and no key."""
        return self._without_key(text.encode("utf-8", "replace").decode())

    def _without_key(self, text: str) -> str:
        """Endpoints may say the key back; nothing of it may be shown or written."""
        return text.replace(self._key, "[key]") if self._key else text


def _key(variable: str) -> str | None:
    """The key in an environment variable; None if the usual one is not set."""
    key = os.environ.get(variable, "").strip()
    if not key:
        if variable == KEY_VARIABLE:
            return None
        raise ConfigError(
            f"`judge_key_variable` must name an environment variable that holds the key, but "
            f"{variable} is not set"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"the key in {variable} must be printable ASCII without blanks, but holds something "
            f"else; set it anew"
        )
    return key


def _cause(error: Exception) -> str:
    """The innermost reason of a failed connection."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return " ".join(str(cause).split())[:200] or type(cause).__name__


def _count(usage: Any, name: str) -> int | None:
    value = getattr(usage, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
