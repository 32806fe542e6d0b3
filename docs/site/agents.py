# SPDX-License-Identifier: Apache-2.0
"""The site for coding agents: llms.txt (https://llmstxt.org), and each page and all as Markdown.

Links in Markdown pages lead to the Markdown of other pages.
"""

import re
import tomllib
from collections.abc import Iterator, Mapping
from inspect import cleandoc
from pathlib import Path
from typing import Any

import griffe

DIRECTIVE = re.compile(r"^::: ([\w.]+)$", re.MULTILINE)
# Long records that answer no question of a user
NOT_IN_ONE_PAGE = {"log.md", "messages.md", "results.md", "changelog.md", "contributing.md"}


def write_for_agents(texts: Mapping[str, str], config: Path, site: Path) -> None:
    """Write llms.txt, llms-full.txt and the Markdown of every page into the site."""
    project = tomllib.loads(config.read_text(encoding="utf-8"))["project"]
    package = griffe.load("keylayers", search_paths=[config.parents[2] / "src"])
    filters = project["plugins"]["mkdocstrings"]["handlers"]["python"]["options"]["filters"]
    plain = {page: _without_directives(text, package, filters) for page, text in texts.items()}
    for page, text in plain.items():
        (site / page).write_text(text, encoding="utf-8")
    head = f"# {project['site_name']}\n\n> {project['site_description']}\n"
    index, whole = [head], [head]
    for section, names in _sections(project["nav"]):
        index.append(f"## {section}\n")
        index += [f"- [{_title(plain[name])}]({name}): {_opening(plain[name])}" for name in names]
        index.append("")
        whole += [plain[name] for name in names if name not in NOT_IN_ONE_PAGE]
    (site / "llms.txt").write_text("\n".join(index), encoding="utf-8")
    (site / "llms-full.txt").write_text("\n".join(whole), encoding="utf-8")


def listed(config: Path) -> set[str]:
    """The pages that the site's navigation has."""
    nav = tomllib.loads(config.read_text(encoding="utf-8"))["project"]["nav"]
    return {page for _, pages in _sections(nav) for page in pages}


def _sections(nav: list[dict[str, Any]]) -> Iterator[tuple[str, list[str]]]:
    for entry in nav:
        ((title, pages),) = entry.items()
        listed = pages if isinstance(pages, list) else [pages]
        yield title, [one if isinstance(one, str) else "".join(one.values()) for one in listed]


def _title(text: str) -> str:
    return text.partition("\n")[0].removeprefix("# ")


def _opening(text: str) -> str:
    """The first sentence of a page."""
    without_code = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    paragraphs = (part for part in without_code.split("\n\n") if re.match(r"\n*[\w`\[]", part))
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", " ".join(next(paragraphs, "").split()))
    return re.split(r"(?<=[.:])\s", plain)[0].rstrip(":.") + "."


def _without_directives(text: str, package: griffe.Module, filters: list[str]) -> str:
    """A page with the signatures and docstrings that its directives ask for."""
    hidden = re.compile("|".join(one.removeprefix("!") for one in filters))

    def documented(match: re.Match[str]) -> str:
        found = package[match[1].removeprefix("keylayers.")]
        return "\n\n".join(_entry(match[1], found, hidden))

    return DIRECTIVE.sub(documented, text)


def _entry(
    name: str, found: griffe.Object | griffe.Alias, hidden: re.Pattern[str]
) -> Iterator[str]:
    yield f"### {name}"
    if found.is_function or found.is_class:
        yield f"```python\n{found.signature(name=name)}\n```"
    members = found.members if found.is_class else {}
    for documented in filter(None, (found, members.get("__init__"))):
        if documented.docstring is not None:
            yield cleandoc(documented.docstring.value)
    for member in members.values():
        if not hidden.search(member.name) and member.docstring is not None:
            yield from _entry(f"{name}.{member.name}", member, hidden)
