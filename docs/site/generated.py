# SPDX-License-Identifier: Apache-2.0
"""Pages of the site that are made from the code: API, commands, formulas, error messages."""

import ast
import re
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import griffe

import keylayers
from keylayers.cli import app
from keylayers.errors import GuardError
from keylayers.scores.methods import BUILT_IN

from messages import Message, messages

ROOT = Path(__file__).resolve().parents[2]
# Topic -> files and folders of the package whose messages it has; the first that fits
TOPICS = {
    "Data": ("data/",),
    "Models, adapters and checkpoints": ("model/", "updates/", "apply/"),
    "Rankings and budgets": ("ranking/", "validation.py"),
    "Training and trainers": ("training/", "trainers/"),
    "Scoring": ("scores/", "gates.py"),
    "Evaluation": ("evaluation/",),
    "Exports": ("export/",),
    "Reports and figures": ("report/",),
    "Studies": ("commands/study",),
    "Options and files": ("",),
}
# What docs/add-a-method.md uses
FOR_METHODS = (
    "scores.task.Task",
    "scores.task.MaskedModel",
    "scores.task.ModuleScores",
    "scores.options.MethodOptions",
    "scores.options.Batched",
    "scores.options.checked",
)
GUARDS = "Checks of keylayers on itself"


def _scores() -> dict[Path, list[str]]:
    """The file of each scoring method, with the names of its methods."""
    files = defaultdict(list)
    for method in BUILT_IN:
        spec = find_spec(str(method.function).partition(":")[0])
        assert spec is not None
        files[Path(str(spec.origin))].append(method.name)
    return files


# File of the repository -> its place in the site
HOMES = {
    "src/keylayers/__init__.py": "api.md",
    "src/keylayers/cli.py": "commands.md",
    "docs/site/messages.py": "messages.md",
} | {path.relative_to(ROOT).as_posix(): f"formulas.md#{path.stem}" for path in _scores()}


def pages() -> dict[str, str]:
    """The text of each generated page by its name."""
    return {
        "api.md": api(),
        "commands.md": commands(),
        "formulas.md": formulas(),
        "messages.md": listed_messages(),
    }


def api() -> str:
    """Directives for all public names, and for what methods of your own get."""
    package = griffe.load("keylayers", search_paths=[ROOT / "src"])
    public = {name: package[name] for name in keylayers.__all__ if not name.startswith("_")}
    of_errors = [*package["errors"].classes]
    names = {True: [], False: []}  # whether it is a class
    for name, found in public.items():
        if name not in of_errors:
            names[found.is_class].append(name)
    sections = {
        "Functions": names[False],
        "Classes": names[True],
        "For methods of your own": FOR_METHODS,
        "Exceptions": [f"errors.{name}" for name in of_errors],
    }
    lines = [
        "# Python API",
        "",
        "All names of `keylayers`, and a few from below it.",
    ]
    for title, listed in sections.items():
        lines += ["", f"## {title}", "", *(f"::: keylayers.{name}\n" for name in listed)]
    return "\n".join(lines)


def commands() -> str:
    """Every command with its options, as `--help` has them."""
    text = app.generate_docs(output_format="markdown")
    _, first, rest = text.partition("\n## keylayers ")
    # lines of one description, and names of pages in it
    rest = re.sub(r"\n    (?=\S)", " ", first + rest)
    rest = re.sub(r"docs/([\w-]+)\.md", r"[\1](\1.md)", rest)
    return f"# Commands\n\nWhat `keylayers COMMAND --help` says, on one page.\n\n{rest}"


def formulas() -> str:
    """What the file of each method says about it."""
    lines = ["# Formulas and sources", "", "The docstring of each file in `keylayers/scores`.", ""]
    for path, names in _scores().items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        text = re.sub(r"^(Source|Differs|Cost|Blind to):", r"\n**\1:**", text, flags=re.MULTILINE)
        titles = ", ".join(f"`{name}`" for name in names)
        lines += [f"## {titles} {{ #{path.stem} }}", "", text, ""]
    return "\n".join(lines)


def listed_messages() -> str:
    """Every error message by topic."""
    found: dict[str, list[Message]] = defaultdict(list)
    for message in messages():
        found[_topic(message)].append(message)
    lines = [
        "# Every error message",
        "",
        "Made from the sources. `…` is filled in by the run, so search for a few words that are",
        "not names or numbers. Each line says what must hold, what came, which is the cause, and",
        "what to do. What libraries say is passed on and not listed. The exit code is 2, or 1",
        "where a heading says so. [Troubleshooting](troubleshooting.md) explains those you may",
        "meet most.",
        "",
    ]
    for topic in [*TOPICS, GUARDS]:
        lines += [f"## {topic}" + (" (exit code 1)" if topic == GUARDS else ""), ""]
        lines += [f"- ``{message.text}`` ({message.error})" for message in found[topic]]
        lines.append("")
    return "\n".join(lines)


def _topic(message: Message) -> str:
    if message.error == GuardError.__name__:
        return GUARDS
    return next(topic for topic, places in TOPICS.items() if message.file.startswith(places))
