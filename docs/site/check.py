# SPDX-License-Identifier: Apache-2.0
"""Dead links and requests to other hosts in a built site, found without a network."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Attributes that a browser follows by itself; `href` of what is no link to click on, too
LOADED = {"src", "srcset", "poster", "data", "action", "background"}
CLICKED = {"a", "area", "base"}
IN_STYLE = re.compile(r"""(?:url\(|@import\s+)\s*["']?([^"')\s]+)""")


class Page(HTMLParser):
    """Ids, links and loaded files of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = IN_STYLE.findall(text)
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take what a tag has."""
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.ids.add(value)
            elif name == "href" and tag in CLICKED:
                self.links.append(value or "")
            elif name in LOADED or name == "href":
                self.loaded += [part.split()[0] for part in (value or "").split(",") if part]


def problems(site: Path) -> list[str]:
    """A line for each dead link and each request that leaves the site."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    assert pages, f"no pages in {site}"
    found = [line for path in pages for line in _of_page(site, path, pages)]
    for path in sorted(site.rglob("*.css")):
        loaded = IN_STYLE.findall(path.read_text(encoding="utf-8"))
        found += [f"{path.name}: loads {address}" for address in loaded if _is_elsewhere(address)]
    return found


def _of_page(site: Path, path: Path, pages: dict[Path, Page]) -> Iterator[str]:
    name, page = path.relative_to(site), pages[path]
    for address in page.loaded:
        if _is_elsewhere(address):
            yield f"{name}: loads {address}"
        elif not _is_data(address) and not _target(site, path, urlsplit(address).path).exists():
            yield f"{name}: loads {address}, which does not exist"
    for link in page.links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            continue
        target = _target(site, path, parts.path)
        if target.is_dir():
            target /= "index.html"
        if not target.is_file():
            yield f"{name}: links to {link}, which does not exist"
        elif target in pages and unquote(parts.fragment) not in {"", *pages[target].ids}:
            yield f"{name}: links to {link}, which has no such anchor"


def _target(site: Path, page: Path, address: str) -> Path:
    """The file at an address on a page; the page for missing addresses has them from the root."""
    if address.startswith("/"):
        return site / unquote(address).lstrip("/")
    return (page.parent / unquote(address)).resolve() if address else page


def _is_elsewhere(address: str) -> bool:
    parts = urlsplit(address)
    return bool(parts.netloc) or parts.scheme in ("http", "https", "ws", "wss", "ftp")


def _is_data(address: str) -> bool:
    return urlsplit(address).scheme in ("data", "blob") or address.startswith(("#", "%23"))
