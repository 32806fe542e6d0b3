# SPDX-License-Identifier: Apache-2.0
"""The notebooks of examples/ as pages, with their stored outputs."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


def page(notebook: Path, images: Path, linked: Callable[[str], str]) -> str:
    """The Markdown of a notebook; its pictures become files in the folder `images`.

    `linked` gives a text whose links lead to pages of the site.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    images.mkdir(parents=True, exist_ok=True)
    parts: list[str] = []
    for number, cell in enumerate(cells):
        source = "".join(cell["source"])
        is_text = cell["cell_type"] == "markdown"
        parts.append(linked(source) if is_text else _fenced("python", source))
        for output in cell.get("outputs", ()):
            parts += _shown(output, images, f"{notebook.stem}-{number}.svg")
    return "\n\n".join(parts) + "\n"


def _shown(output: Mapping[str, Any], images: Path, name: str) -> Iterator[str]:
    found = output.get("data", {"text/plain": output.get("text", "")})
    if "image/svg+xml" in found:
        (images / name).write_text("".join(found["image/svg+xml"]), encoding="utf-8")
        yield f"![What the cell above draws]({images.name}/{name})"
    elif text := "".join(found["text/plain"]).rstrip():
        yield _fenced("text", text)


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
