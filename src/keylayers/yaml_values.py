# SPDX-License-Identifier: Apache-2.0
"""Plain values from YAML: texts, finite numbers, true, false and null, in lists and mappings."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from keylayers.environment import check_no_password
from keylayers.errors import ConfigError

MOST_PARTS = 500_000  # pieces of JSON text with aliases written out: about 150,000 values
# What PyYAML 6 raises apart from its own error: for numbers and dates out of range, and for tags
# that do not fit their value (`!!int ''`).
BROKEN = (ValueError, RecursionError, LookupError, AttributeError, TypeError)


def read_yaml(path: Path, option: str) -> dict[str, Any]:
    """The mapping that the YAML file of an option holds; empty for an empty file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"`{option}` must be a YAML file, but {str(path)!r} cannot be read: {error.strerror}"
        ) from error
    options = yaml_value(content, repr(str(path)))
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise ConfigError(
            f"{str(path)!r} must map options to values, got a {type(options).__name__}"
        )
    return {str(key): value for key, value in options.items()}


def yaml_value(text: str | bytes, source: str) -> Any:
    """The value of a YAML text, which messages call `source`."""
    try:
        value = _Loader(text).get_single_data()
    except (yaml.YAMLError, *BROKEN) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{source} must be valid YAML, but is not: {reason}") from error
    try:
        # `iterencode` is lazy, so a few aliases that stand for billions of values cost nothing.
        encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
        for number, part in enumerate(encoder.iterencode(value)):
            check_no_password(part, source)
            if number > MOST_PARTS:
                raise ConfigError(f"{source} must be smaller, with aliases written out")
    except (RecursionError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{source} must hold texts, finite numbers, true, false, null, lists and mappings "
            f"alone, but: {error}; put a text in quotes"
        ) from error
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which would silently take the last of two equal keys."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.YAMLError(f"a {node.tag} must be a mapping")
        own = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        counts = Counter(key.value for key in own if isinstance(key, yaml.ScalarNode))
        for key, count in counts.most_common(1):
            if count > 1:
                raise yaml.YAMLError(f"the key {key!r} appears twice in one mapping")
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: Any) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MOST_PARTS:  # merges of merges double it each time
            raise yaml.YAMLError("its merges must be smaller")
