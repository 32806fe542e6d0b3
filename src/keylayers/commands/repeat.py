# SPDX-License-Identifier: Apache-2.0
"""The command that repeats a run, for reports and model cards."""

import shlex
from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib import import_module
from typing import Any, Literal, get_type_hints

from keylayers.commands.config import flag_words, taken_from_ranking
from keylayers.ranking.ranking import Ranking

Command = Literal["rank", "train", "prune"]


def command_line(
    command: Command, options: Mapping[str, Any], ranked_with: Mapping[str, Any] | None = None
) -> str:
    """`keylayers ...` in the words of a shell, with every flag that the run needs.

    Options at their default are left out, unless the ranking would set another value, and so are
    options that the ranking sets to the same value.

    Args:
        command: Which sub-command.
        options: By field name, as a record holds them.
        ranked_with: The options that the ranking records, if they are known.
    """
    taken = taken_from_ranking(command) if options.get("ranking") is not None else ()
    # Imported by name: the commands write model cards, which need this file.
    file = import_module(f"keylayers.commands.{command}")
    words = ["keylayers", command]
    for part in get_type_hints(getattr(file, f"{command.title()}Options")).values():
        for option in fields(part):
            name, value = option.name, options.get(option.name)
            default = (ranked_with or {}).get(name, MISSING) if name in taken else option.default
            if value is not None and not _is_same(value, default):
                words += flag_words(name, value)
    return shlex.join(words)


def _is_same(value: Any, default: Any) -> bool:
    """Whether a value from JSON, which has lists for tuples, is the default."""
    if isinstance(default, tuple):
        return list(value) == list(default)
    return default is not MISSING and bool(value == default)


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


def how_it_was_made(command: Command, options: Mapping[str, Any], ranking: Ranking | None) -> str:
    """The commands that lead to a result: how its ranking was made, and its own command."""
    if ranking is None or options.get("rank_first"):
        return command_line(command, options)
    own = command_line(command, options, ranking.made_by.options.given)
    return f"{how_to_repeat(ranking)}\n{own}"
