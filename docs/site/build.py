# SPDX-License-Identifier: Apache-2.0
"""Build the documentation site into build/site: `python docs/site/build.py`.

Pages are those of docs/ and a few of other folders, with links between them rewritten, and what
`generated.py` makes of the code. For agents the site also holds every page as Markdown, llms.txt
and llms-full.txt. `check.py` then looks for dead links and for requests to other hosts.
"""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import notebook_pages

import agents
import check
import generated

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build"
SITE = BUILD / "site"
# Pages that are not in docs/: page -> file of the repository
ELSEWHERE = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "log.md": "experiments/LOG.md",
    "results.md": "experiments/RESULTS.md",
    "recipes.md": "recipes/README.md",
    "recipes-inspect.md": "recipes/inspect/README.md",
    "recipes-mmlu.md": "recipes/mmlu/README.md",
    "recipes-real.md": "recipes/real/README.md",
}
NOTEBOOKS = {
    "notebook-rank.md": "examples/rank_and_read.ipynb",
    "notebook-compress.md": "examples/compress_an_adapter.ipynb",
}
LINK = re.compile(r"(\]\()(?!https?:|#)([^)\s#]+)(#[^)\s]*)?\)")


def pages(images: Path) -> dict[str, str]:
    """The text of every page, by its name in the site; pictures of notebooks go to `images`."""
    files = {path.name: f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))}
    files |= ELSEWHERE
    homes = {file: page for page, file in (files | NOTEBOOKS).items()} | generated.HOMES
    texts = {
        page: _with_links(file, (ROOT / file).read_text(encoding="utf-8"), homes)
        for page, file in files.items()
    }
    for page, file in NOTEBOOKS.items():
        linked = partial(_with_links, file, homes=homes)
        texts[page] = notebook_pages.page(ROOT / file, images, linked)
    return texts | generated.pages()


def _with_links(file: str, text: str, homes: dict[str, str]) -> str:
    """A page whose links lead to pages of the site; `homes` has the page of each file."""

    def moved(match: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(os.path.dirname(file), match[2]))
        if target in homes:
            return f"{match[1]}{homes[target]}{match[3] or ''})"
        if target.startswith("docs/images/"):
            return f"{match[1]}{target.removeprefix('docs/')})"
        raise SystemExit(f"{file}: links may lead to pages of the site, but {match[2]} is none")

    return LINK.sub(moved, text)


def _link_pages_in_docstrings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"\bdocs/([\w-]+)\.md", r'<a href="\1.html">\1</a>', text)
    page.write_text(text, encoding="utf-8")


def main() -> int:
    """Stage the pages, build, write the files for agents, check; returns the exit code."""
    staged = BUILD / "docs"
    for folder in (staged, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    staged.mkdir(parents=True)
    texts = pages(staged / "drawn")
    unlisted = texts.keys() ^ agents.listed(HERE / "zensical.toml")
    if unlisted:
        raise SystemExit(f"`nav` in zensical.toml must have every page once: {sorted(unlisted)}")
    for page, text in texts.items():
        (staged / page).write_text(text, encoding="utf-8")
    images = shutil.ignore_patterns("*.py", "__pycache__")
    shutil.copytree(ROOT / "docs" / "images", staged / "images", ignore=images)
    for name in ("extra.css", "iframe-worker.js"):
        shutil.copy(HERE / name, staged)
    shutil.copy(HERE / "zensical.toml", BUILD)
    zensical = Path(sys.executable).with_name("zensical")
    built = subprocess.run([zensical, "build", "--clean", "--strict"], cwd=BUILD, check=False)
    if built.returncode:
        return built.returncode
    _link_pages_in_docstrings(SITE / "api.html")
    agents.write_for_agents(texts, HERE / "zensical.toml", SITE)
    problems = check.problems(SITE)
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
