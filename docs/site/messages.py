# SPDX-License-Identifier: Apache-2.0
"""Every error message of the sources, for the page that lists them.

What a run fills in is shown as `…`.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import keylayers.errors
from keylayers.errors import KeylayersError

SOURCE = Path(keylayers.__file__).parent
FILLED_IN = "…"


@dataclass(frozen=True)
class Message:
    """A text that a file raises, and the name of its exception."""

    file: str  # below the package
    error: str
    text: str


def messages() -> list[Message]:
    """All messages in the order of files and lines, each once for a file."""
    found = [message for path in sorted(SOURCE.rglob("*.py")) for message in _in_file(path)]
    return list(dict.fromkeys(found))


def _in_file(path: Path) -> Iterator[Message]:
    file = path.relative_to(SOURCE).as_posix()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = {
        node.targets[0].id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        error = ast.unparse(node.func)
        argument = node.args[0]
        if isinstance(argument, ast.Name):
            argument = texts.get(argument.id, argument)
        text = _template(argument)
        if _is_error(error) and text.strip(FILLED_IN):
            yield Message(file, error, re.sub(f"{FILLED_IN}+", FILLED_IN, text))


def _is_error(name: str) -> bool:
    kind = getattr(keylayers.errors, name, None)
    return isinstance(kind, type) and issubclass(kind, KeylayersError)


def _template(node: ast.expr) -> str:
    """A string with its values replaced; what is no string is one value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_template, node.values))
    return FILLED_IN
