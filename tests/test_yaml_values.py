# SPDX-License-Identifier: Apache-2.0
"""YAML gives plain values; odd, huge and secret ones are refused in one line, and soon."""

import pytest

# Each entry of the last one stands for a billion values.
LISTS = "a0: &a0 [1]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 11)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 30)
)
REFUSED = [
    (LISTS, "must be smaller, with aliases written out"),
    (MERGES, "must be valid YAML, but is not: its merges must be smaller"),
    ("a: &a {b: [*a]}", "must hold texts, .* alone, but: Circular reference"),
    ("a: .nan", "but: Out of range float values are not JSON compliant.*; put a text in quotes"),
    ("a: 2026-01-01", "but: Object of type date is not JSON serializable; put a text in quotes"),
    ("a: !!binary aGk=", "but: Object of type bytes"),
    ("a: !!set {1, 2}", "but: Object of type set"),
    ("a: {b: 1, b: 2}", "the key 'b' appears twice in one mapping"),
    ("a: !!map [x]", "must be valid YAML, but is not: a .*:map must be a mapping"),
    ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ("a: [", "must be valid YAML"),
    ("[" * 2000, "must be valid YAML"),
    (f"a: {'1' * 5000}", "must be valid YAML"),
    *(
        (f"a: {odd}", "must be valid YAML")
        for odd in (
            "!!bool abc",
            "!!int ''",
            "!!float ''",
            "!!int '-'",
            "!!timestamp abc",
            "!!set [x]",
        )
    ),
    ("a: {b: ['https://me:hunter2@host/m']}", "it must hold no password"),
    ("'https://me:hunter2@host/m': 1", "it must hold no password"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_plain_is_refused(text, message):
    from keylayers.errors import ConfigError
    from keylayers.yaml_values import yaml_value

    with pytest.raises(ConfigError, match=message) as caught:
        yaml_value(text, "it")
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plain_values_anchors_and_merges_are_read():
    from keylayers.yaml_values import yaml_value

    text = "a: &a {b: 1, c: [2.5, x, null, true]}\nd: {<<: *a, b: 4}\ne: *a"
    held = {"b": 1, "c": [2.5, "x", None, True]}
    assert yaml_value(text, "it") == {"a": held, "d": held | {"b": 4}, "e": held}
    assert yaml_value("", "it") is None
