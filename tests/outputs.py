# SPDX-License-Identifier: Apache-2.0
"""What a run left on disk, without the times that no two runs share."""

import json
import re

# The hash of a ranking covers its file, which holds times.
TIMES = ("seconds", "ranking_sha256")


def contents(folder):
    """Relative path -> content of every file below `folder`, hidden ones too."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): _content(path) for path in files}


def differences(first, second):
    """What differs between two folders' contents: a line for each file, short enough for a log."""
    lines = []
    for path in sorted(first.keys() | second.keys()):
        one, other = str(first.get(path)), str(second.get(path))
        if one != other:
            pairs = enumerate(zip(one, other, strict=False))
            at = next((index for index, (a, b) in pairs if a != b), 0)
            around = slice(max(0, at - 40), at + 40)
            lines.append(f"{path}: {one[around]!r} and {other[around]!r}")
    return lines


def _content(path):
    if path.suffix == ".json":
        return _timeless(json.loads(path.read_text()))
    if path.suffix in (".md", ".csv"):
        return re.sub(r"\d+(\.\d+)? s\b|ranking, SHA-256.*", "_", path.read_text())
    return path.read_bytes()


def _timeless(value):
    if isinstance(value, dict):
        return {name: _timeless(held) for name, held in value.items() if name not in TIMES}
    return [_timeless(one) for one in value] if isinstance(value, list) else value
