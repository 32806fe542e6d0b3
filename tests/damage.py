# SPDX-License-Identifier: Apache-2.0
"""Damaged files: truncated, of wrong types, huge, not UTF-8, with names twice, NaN and Infinity."""

import contextlib
import copy
import json
import os
import time

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from commands import complaint_in, printed

# A tenth of the cases, and always the same ones, unless FUZZ_SCALE asks for new ones.
IS_DEEP = "FUZZ_SCALE" in os.environ
SCALE = float(os.environ.get("FUZZ_SCALE", "0.1"))
LARGE = "ignore:Generating overly large repr"  # of files that are meant to be large
LONGEST_SECONDS = 5


def fuzz(check, contents, count):
    """Check so many contents at full scale; without a database, so that a count is a count."""
    settings(
        max_examples=max(10, round(count * SCALE)),
        deadline=None,
        derandomize=not IS_DEEP,
        database=None,
        suppress_health_check=list(HealthCheck),
    )(given(contents)(check))()


ODD = (
    None, True, False, 0, -1, 1, 2, 10**18, 10**400, -(10**400), 0.5, -0.0, 1e308, 5e-324,
    float("nan"), float("inf"), float("-inf"), "", " ", "nan", "0", "\x00", "\ud800", "a\nb",
    "../../outside", "/etc/passwd", "x" * 100_000, "<script>", "{{ 1 }}", "é" * 300, "\u202e",
    [], {}, [[]], [None], {"": None}, [1, "a"], {"a": {"b": []}},
)  # fmt: skip
values = st.one_of(
    st.sampled_from(ODD).map(copy.deepcopy),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.recursive(
        st.none() | st.integers() | st.text(max_size=4),
        lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(), part, max_size=3),
        max_leaves=6,
    ),
)


def _places(content):
    """Every place in a JSON value, as a list or dict and its index or key."""
    if isinstance(content, (dict, list)):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from _places(content[key])


@st.composite
def changed(draw, content):
    """The value with one to three parts replaced, left out, repeated or renamed."""
    content = copy.deepcopy(content)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(content))
        if not places:
            return draw(values)
        holder, key = draw(st.sampled_from(places))
        act = draw(st.sampled_from(("replace", "replace", "replace", "drop", "repeat", "rename")))
        if act == "replace":
            holder[key] = draw(values)
        elif act == "drop":
            del holder[key]
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
        elif act == "rename":
            holder[draw(st.text(max_size=8))] = holder.pop(key)
    return content


def damaged_bytes(whole):
    """A file cut off, with other bytes in it, or replaced."""
    places = st.integers(0, len(whole))
    return st.one_of(
        places.map(lambda end: whole[:end]),
        st.builds(
            lambda place, new, is_over: whole[:place] + new + whole[place + is_over * len(new) :],
            *(places, st.binary(max_size=6), st.booleans()),
        ),
        st.binary(max_size=60),
        st.sampled_from([b"", b"\xff\xfe", b"\x00" * 100]),
        st.sampled_from([b"[" * 100_000, b'{"a":' * 50_000, b"1" * 5_000, b"null", b"NaN"]),
    )


def damaged_text(text):
    """The bytes of a file that held `text`: as above, or in another encoding."""
    others = (b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16"))
    return damaged_bytes(text.encode()) | st.sampled_from(others)


def damaged_json(content):
    """The bytes of a JSON file that held `content`."""
    dumped = st.builds(json.dumps, changed(content), ensure_ascii=st.booleans())
    return dumped.map(lambda text: text.encode("utf-8", "surrogatepass")) | damaged_text(
        json.dumps(content)
    )


def damaged_yaml(content):
    """The bytes of a YAML file that held `content`: damaged, or another small mapping."""

    def is_small(value):
        return isinstance(value, dict) and len(str(value)) < 4000 and "\ud800" not in str(value)

    dumped = changed(content).filter(is_small).map(lambda value: yaml.safe_dump(value).encode())
    return st.one_of(dumped, damaged_text(yaml.safe_dump(content)))


def begin(*arguments):
    """A first call, however long it takes: it imports."""
    with contextlib.suppress(AssertionError):
        run(*arguments)


def run(*arguments):
    """The exit code of a command, which must be 0 or 2, with one line for 2, and soon."""
    start = time.process_time()
    code, _, err = printed(*arguments)
    assert time.process_time() - start < LONGEST_SECONDS
    assert code in (0, 2), (code, err)
    if code == 2:
        complaint_in(err)
    return code
