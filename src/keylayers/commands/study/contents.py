# SPDX-License-Identifier: Apache-2.0
"""Options as they are hashed: files by what they hold, so that a study can be moved."""

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

from keylayers.errors import ConfigError
from keylayers.files import json_sha256

# Or names of the hub, or of lm-evaluation-harness.
FILES = (
    *("model", "data", "adapter", "tuned", "chat_template"),
    *("forgetting_data", "task_folder"),
)


def content(name: str, value: Any) -> Any:
    """The value of an option; of a file or a folder that is there, its hash.

    Raises:
        ConfigError: it can be no file, folder or name.
    """
    if isinstance(value, (list, tuple)):
        return [content(name, one) for one in value]
    if name in FILES and isinstance(value, str):
        try:
            if Path(value).exists():
                return {"sha256": _sha256(Path(value).resolve())}
        except OSError as error:  # such as a name longer than the system takes
            raise ConfigError(
                f"`{name}` of a study must be a file, a folder or a name, but {value[:40]!r} "
                f"cannot be one: {error.strerror}"
            ) from error
    return value


@cache
def _sha256(path: Path) -> str:
    """Of a file, or of all files of a folder with their names."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(one for one in path.rglob("*") if one.is_file())
    return json_sha256([[str(one.relative_to(path)), _sha256(one)] for one in files])
