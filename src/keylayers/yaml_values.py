# SPDX-License-Identifier: Apache-2.0
"""What YAML holds: texts, finite numbers, true, false and null, in lists and mappings."""

import math
from collections.abc import Mapping
from typing import Any

from keylayers.environment import check_no_password
from keylayers.errors import ConfigError

MOST_VALUES = 100_000  # aliases counted each time they stand for something
# What its parser raises beside its own error: for numbers and dates out of range, and tags that
# their values do not fit (`!!int ''`).
BROKEN = (ValueError, RecursionError, LookupError, AttributeError, TypeError)
PLAIN = (str, int, float, bool, type(None))


def yaml_value(text: str, source: str) -> Any:
    """What `text` holds.

    Args:
        text: In YAML.
        source: What messages call it.

    Raises:
        ConfigError: it is no YAML; a key stands twice; a value is of another kind, not finite, or
            a part of itself; it holds a password, or too much.
    """
    import yaml

    try:
        loader = _loader()(text)
        value = loader.get_single_data()
    except (yaml.YAMLError, *BROKEN) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{source} must be valid YAML, but is not: {reason}") from error
    _check(value, source, {}, set())
    return value


def _loader() -> Any:
    """YAML's safe loader, which by itself takes the last of two equal keys without a word."""
    import yaml

    class Loader(yaml.SafeLoader):
        """The same, and a key that stands twice is an error."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """A mapping from its node."""
            if not isinstance(node, yaml.MappingNode):
                raise yaml.YAMLError(f"a {node.tag} must be a mapping")
            own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            names = [key.value for key in own if isinstance(key, yaml.ScalarNode)]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise yaml.YAMLError(f"the key {twice!r} stands twice in one mapping")
            return super().construct_mapping(node, deep)

    return Loader


def _check(value: Any, source: str, counts: dict[int, int], above: set[int]) -> int:
    """How many values it holds, aliases written out.

    Args:
        value: To check.
        source: What messages call it.
        counts: What is known already, by identity.
        above: Identities of what holds the value.
    """
    if isinstance(value, PLAIN):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"every number in {source} must be finite, got {value}")
        if isinstance(value, str):
            check_no_password(value, source)
        return 1
    if not isinstance(value, (list, dict)):
        raise ConfigError(
            f"every value in {source} must be a text, a number, true, false, null, a list or a "
            f"mapping, got a {type(value).__name__}; put a text in quotes"
        )
    if id(value) in above:
        raise ConfigError(f"no value in {source} must be a part of itself, but an alias makes one")
    if id(value) not in counts:
        parts = [*value, *value.values()] if isinstance(value, Mapping) else value
        held = above | {id(value)}
        counts[id(value)] = 1 + sum(_check(one, source, counts, held) for one in parts)
    if counts[id(value)] > MOST_VALUES:
        raise ConfigError(
            f"{source} must hold at most {MOST_VALUES:,} values, aliases written out, but holds "
            f"more"
        )
    return counts[id(value)]
