# SPDX-License-Identifier: Apache-2.0
"""The command that repeats a run, for reports and model cards."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields
from importlib import import_module
from typing import Any, Literal

from keylayers.commands.config import TAKEN_FROM_RANKING, TAKEN_WITH_UPDATE
from keylayers.commands.scoring_flags import ScoringFlags
from keylayers.ranking.ranking import Ranking
from keylayers.scores.scoring_options import ScoringOptions

Command = Literal["rank", "train", "verify", "prune", "eval"]


def command_line(
    command: Command, options: Mapping[str, Any], ranked_with: Mapping[str, Any] | None = None
) -> str:
    """`keylayers ...` in the words of a shell, with every flag that the run needs.

    Options at their default are left out, unless the ranking would set another value, and so are
    options that the ranking sets to the same value.

    Args:
        command: Which sub-command.
        options: By field name, as a record holds them (`flat()`).
        ranked_with: The options that the ranking records, if they are known.
    """
    return shlex.join(["keylayers", *command_words(command, options, ranked_with)])


def command_words(
    command: Command, options: Mapping[str, Any], ranked_with: Mapping[str, Any] | None = None
) -> list[str]:
    """The words of `command_line`, from the sub-command on."""
    inherited: tuple[str, ...] = ()
    if options.get("ranking") is not None:
        others = ("steps",) if command == "train" else TAKEN_WITH_UPDATE
        inherited = (*TAKEN_FROM_RANKING, *others)
    words: list[str] = [command]
    if command == "verify" and options.get("ranking") is not None:  # not a field of its options
        words += ["--ranking", str(options["ranking"])]
    for option in _fields(command):
        name, value = option.name, options.get(option.name)
        default = (ranked_with or {}).get(name, MISSING) if name in inherited else option.default
        if value is None or _is_same(value, default):
            continue
        words += _words("--" + name.replace("_", "-"), value)
    return words


def _fields(command: Command) -> Iterator["Field[Any]"]:
    """Every option of a command, in the order of its options classes.

    The command's file is imported here, by name: it writes model cards, which need this file.
    """
    module = import_module(f"keylayers.commands.{command}")
    for part in fields(getattr(module, f"{command.title()}Options")):
        flags = ScoringFlags if part.type is ScoringOptions else part.type
        yield from fields(flags)  # type: ignore[arg-type]


def _is_same(value: Any, default: Any) -> bool:
    """Whether a value from JSON, which has lists for tuples, is the default."""
    if default is MISSING:
        return False
    return list(value) == list(default) if isinstance(default, tuple) else bool(value == default)


def _words(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    values = value if isinstance(value, (list, tuple)) else [value]
    return [flag, *map(str, values)] if values else []


def how_to_repeat(ranking: Ranking) -> str:
    """The command that made the ranking, or the call where it was made from Python."""
    made_by = ranking.made_by
    options = made_by.options.given
    if options.get("rank_first"):
        return command_line("train", options)
    if "data" in options and "model" in options:
        return command_line("rank", options)
    if made_by.imported is not None:
        model = str(made_by.model.name)
        return shlex.join(["keylayers", "import", made_by.imported.file, "--model", model])
    if ranking.method == "step-scores":
        return "# made by the callback keylayers.StepScores inside a run of your own"
    if ranking.method == "consensus":
        return "# made by keylayers compare RANKING RANKING ... --consensus FILE"
    return (
        f"# made from Python by keylayers.rank_modules on a {made_by.trainer}, method "
        f"{ranking.method}"
    )


def how_it_was_made(
    command: Command, options: Mapping[str, Any], ranking: Ranking | None = None
) -> str:
    """The commands that lead to a result: how its ranking was made, and its own command."""
    if ranking is None or options.get("rank_first"):
        return command_line(command, options)
    own = command_line(command, options, ranking.made_by.options.given)
    return f"{how_to_repeat(ranking)}\n{own}"
