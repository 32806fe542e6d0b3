# SPDX-License-Identifier: Apache-2.0
"""The judge's endpoint and what can be wrong with it: one clear line, or counted; retried."""

import traceback

import pytest

from scripted_judge import endpoint

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

KEY = "sk-" + "kEyLaYeRs" * 4
SLOW_DOWN = ("status", 429, "slow down")


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def options(address, **more):
    from keylayers.evaluation.judge.options import EndpointOptions

    given = {"judge_retries": 2, "judge_requests_at_once": 1, "judge_max_tokens": 64, **more}
    return EndpointOptions(judge_url=address, judge_model="the judge", **given)


def ask(script, prompt="Rate this.", **more):
    from keylayers.evaluation.judge.client import JudgeClient

    with JudgeClient(options(script.address, **more)) as client:
        return client.ask(prompt)


def test_a_prompt_gets_its_reply_and_the_key_goes_with_it():
    with endpoint(("text", "Good. [[7]]")) as script:
        reply = ask(script)
    assert (reply.text, reply.finish_reason) == ("Good. [[7]]", "stop")
    assert (reply.prompt_tokens, reply.completion_tokens) == (100, 10)
    assert script.asked == [
        {
            "path": "/v1/chat/completions",
            "key": KEY,
            "model": "the judge",
            "messages": [{"role": "user", "content": "Rate this."}],
            "temperature": 0.0,
            "max_tokens": 64,
        }
    ]


def test_what_is_sent_follows_the_options():
    more = {"judge_temperature": None, "judge_limit_field": "max_completion_tokens"}
    with endpoint(("text", "[[7]]")) as script:
        ask(script, **more)
    assert script.asked[0]["max_completion_tokens"] == 64
    assert not {"temperature", "max_tokens"} & set(script.asked[0])


@pytest.mark.parametrize(
    ("end", "path"),
    [
        ("", "/v1"),
        ("/", "/v1"),
        ("/v1/", "/v1"),
        ("/api/v2", "/api/v2"),
        ("/v1/chat/completions", "/v1"),
    ],
)
def test_addresses_are_taken_as_people_give_them(end, path):
    with endpoint(("text", "[[7]]")) as script:
        script.address += end
        ask(script)
    assert script.asked[0]["path"] == f"{path}/chat/completions"


def test_a_server_of_ones_own_needs_no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with endpoint(("text", "[[7]]")) as script:
        ask(script)
    assert script.asked[0]["key"] == "no-key"


RETRIED = [
    [SLOW_DOWN, SLOW_DOWN],
    [("status", 500, "a moment please")],
    [("status", 503, "overloaded"), ("hang_up",)],
]


@pytest.mark.parametrize("failures", RETRIED, ids=str)
def test_what_may_pass_is_tried_again(failures):
    with endpoint(*failures, ("text", "[[7]]")) as script:
        assert ask(script).text == "[[7]]"
    assert len(script.asked) == len(failures) + 1


UNUSABLE = [
    (
        ("status", 401, "Incorrect API key provided: KEY"),
        "refused the key in OPENAI_API_KEY (HTTP 401); set one that it takes",
        1,
    ),
    (("status", 402, "insufficient balance"), "wants to be paid (HTTP 402: 'insufficient bal", 1),
    (("status", 404, "no such model"), "knows no such place or model (HTTP 404: 'no such mod", 1),
    (("status", 418, "a teapot"), "answered HTTP 418: 'a teapot'", 1),
    (
        SLOW_DOWN,
        "was too busy in all 3 tries, or a quota is used up (HTTP 429: 'slow down'); lo",
        3,
    ),
    (("status", 503, "overloaded"), "answered HTTP 503: 'overloaded'", 3),
    (("page",), "answered with a page that is no JSON; mend `judge_url`, which often ends in", 1),
    (("redirect", "https://example.com/v1"), "is at another address, 'https://example.com/v1'", 1),
    (("raw", "{not json"), "answered with what cannot be read", 1),
    (("raw", ""), "answered with what cannot be read", 1),
    (("json", [1, 2]), "answered with something else; mend `judge_url`", 1),
    (("json", "hello"), "answered with a page that is no JSON; mend `judge_url`", 1),
    (("huge", 5 * 2**20), "its reply has 5,242,882 bytes, more than 4 MiB", 1),
    (("hang_up",), "cannot be reached: ", 3),
]


@pytest.mark.parametrize(("step", "line", "tries"), UNUSABLE, ids=lambda one: str(one)[:40])
def test_an_endpoint_that_cannot_be_used_is_one_line(step, line, tries):
    from keylayers.errors import JudgeError

    with endpoint(step) as script, pytest.raises(JudgeError) as caught:
        ask(script)
    said = str(caught.value)
    assert said.startswith(f"the judge at {script.address}/v1 must answer chats, but ")
    assert line in said
    assert "\n" not in said
    assert KEY not in said
    assert len(script.asked) == tries


def test_nobody_there_is_one_line():
    from keylayers.errors import JudgeError

    with endpoint(("page",)) as script:
        pass
    with pytest.raises(JudgeError, match=r"cannot be reached: .*refused.*; start it, or mend"):
        ask(script, judge_retries=0)


def test_silence_is_one_line():
    from keylayers.errors import JudgeError

    with (
        endpoint(("slow", 1.0, "[[7]]")) as script,
        pytest.raises(JudgeError, match=r"did not answer within 0\.1 s, in 1 tries; raise"),
    ):
        ask(script, judge_retries=0, judge_timeout_seconds=0.1)


REFUSED = [
    (("status", 400, "this model's maximum context length is 10"), "HTTP 400: \"this model's max"),
    (
        ("status", 403, "no rights: sk-k****LaYeRs"),
        "HTTP 403: its words are not shown, for they may",
    ),
    (("status", 500, "the prompt broke it"), "HTTP 500: 'the prompt broke it'"),
    (("json", {"object": "chat.completion", "choices": []}), "the reply holds no choices"),
    (("json", {"object": "chat.completion", "choices": None}), "the reply holds no choices"),
    (("json", {"object": "chat.completion"}), "the reply holds no choices"),
    (("json", {"choices": [{"message": {"content": [1]}}]}), "the reply's content is no text"),
]


@pytest.mark.parametrize(("step", "line"), REFUSED, ids=lambda one: str(one)[:40])
def test_a_prompt_that_gets_no_reply_is_told_from_an_endpoint_that_fails(step, line):
    from keylayers.evaluation.judge.client import Refused

    with endpoint(step) as script, pytest.raises(Refused) as caught:
        ask(script, judge_retries=0)
    assert line in str(caught.value)


EMPTY = [
    {"choices": [{"message": {"content": None}, "finish_reason": "length"}]},
    {"choices": [{"message": None}]},
    {"choices": [{}], "usage": {"prompt_tokens": "many"}},
]


@pytest.mark.parametrize("content", EMPTY, ids=str)
def test_a_reply_without_words_is_an_empty_reply(content):
    with endpoint(("json", content)) as script:
        reply = ask(script)
    assert reply.text == ""
    assert reply.prompt_tokens is None


def test_a_key_that_is_said_back_is_not_passed_on():
    with endpoint(("text", "Your key is KEY. [[7]]")) as script:
        assert ask(script).text == "Your key is [key]. [[7]]"


KEY_SAID_BACK = [
    ("status", 404, "x" * 280 + "KEY"),  # where the line is cut
    ("status", 401, f"Incorrect API key provided: {KEY[:9]}********"),
    ("status", 418, "'KEY' \\"),
    ("redirect", f"https://example.com/{KEY}"),
    ("raw", "not json " + KEY),
]


@pytest.mark.parametrize("step", KEY_SAID_BACK, ids=lambda one: str(one)[:40])
@pytest.mark.parametrize("key", [KEY, 'sk-it\'s\\"quoted"'])
def test_no_part_of_a_key_is_in_a_line_or_a_traceback(monkeypatch, step, key):
    from keylayers.errors import JudgeError

    monkeypatch.setenv("OPENAI_API_KEY", key)
    with endpoint(step) as script, pytest.raises(JudgeError) as caught:
        ask(script)
    said = "".join(traceback.format_exception(caught.value))
    assert key[:9] not in said
    assert repr(key)[1:9] not in said


def test_an_endpoint_that_wants_a_key_is_told_from_one_that_refuses_it(monkeypatch):
    from keylayers.errors import JudgeError

    monkeypatch.delenv("OPENAI_API_KEY")
    with endpoint(("status", 401, "no")) as script, pytest.raises(JudgeError) as caught:
        ask(script)
    assert str(caught.value).endswith("but wants a key (HTTP 401); set OPENAI_API_KEY")


def test_half_characters_become_whole_ones():
    with endpoint(("raw", '{"choices": [{"message": {"content": "a \\ud83d b"}}]}')) as script:
        assert ask(script).text == "a ? b"


KEYS = [
    ({"judge_key_variable": "MY_KEY"}, None, "MY_KEY is not set"),
    ({}, "sk-two words", "the key in OPENAI_API_KEY must be printable ASCII without blanks"),
    ({}, "sk-\nline", "must be printable ASCII without blanks"),
    ({}, "sk-ключ", "must be printable ASCII without blanks"),
]


@pytest.mark.parametrize(("more", "key", "line"), KEYS)
def test_a_key_that_is_missing_or_none_is_refused(monkeypatch, more, key, line):
    from keylayers.errors import ConfigError
    from keylayers.evaluation.judge.client import JudgeClient

    monkeypatch.setenv("OPENAI_API_KEY", key or KEY)
    with pytest.raises(ConfigError) as caught:
        JudgeClient(options("http://127.0.0.1:9", **more))
    assert line in str(caught.value)
    assert (key or KEY) not in str(caught.value)


def test_the_key_comes_from_the_variable_that_is_named(monkeypatch):
    monkeypatch.setenv("MY_KEY", "mine")
    with endpoint(("text", "[[7]]")) as script:
        ask(script, judge_key_variable="MY_KEY")
    assert script.asked[0]["key"] == "mine"


BAD_OPTIONS = [
    ({"judge_url": "localhost:8000"}, "must be an address such as"),
    ({"judge_url": "ftp://host"}, "must be an address such as"),
    ({"judge_url": "http://"}, "must be an address such as"),
    ({"judge_url": "http://host:port"}, "must be an address such as"),
    ({"judge_url": "http://a b"}, "must be an address such as"),
    ({"judge_url": "http://a..b"}, "must be an address such as"),
    ({"judge_url": "http://a\x1b[31m"}, "must be an address such as"),
    ({"judge_url": "http://a/" + "b" * 3000}, "must be an address such as"),
    ({"judge_url": "https://me:" + KEY + "@host/v1"}, "must hold no user, password or query"),
    ({"judge_url": "https://host/v1?key=" + KEY}, "must hold no user, password or query"),
    ({"judge_model": " "}, "`judge_model` must be the judge's name"),
    ({"judge_temperature": -1.0}, "`judge_temperature` must be 0 or more"),
    ({"judge_max_tokens": 0}, "`judge_max_tokens` must be at least 1"),
    ({"judge_requests_at_once": 0}, "`judge_requests_at_once` must be at least 1"),
    ({"judge_retries": -1}, "`judge_retries` must be at least 0"),
    ({"judge_timeout_seconds": 0.0}, "`judge_timeout_seconds` must be above 0"),
    ({"judge_price_input": 1.0}, "must be given together"),
    ({"judge_price_input": float("nan"), "judge_price_output": 1.0}, "must be 0 or more"),
]


@pytest.mark.parametrize(("given", "line"), BAD_OPTIONS, ids=lambda one: str(one)[:50])
def test_options_out_of_range_are_one_line(given, line):
    from keylayers.errors import ConfigError
    from keylayers.evaluation.judge.options import EndpointOptions

    with pytest.raises(ConfigError) as caught:
        EndpointOptions(**{"judge_url": "http://host", "judge_model": "m"} | given)
    assert line in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("host", ["256.256.256.256", "☃.invalid"])
def test_an_address_that_the_client_refuses_is_one_line(host):
    from keylayers.errors import ConfigError
    from keylayers.evaluation.judge.client import JudgeClient

    with pytest.raises(ConfigError, match=r"`judge_url` must be an address that can be used: Inva"):
        JudgeClient(options(f"http://{host}"))
