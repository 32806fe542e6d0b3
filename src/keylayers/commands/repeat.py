# SPDX-License-Identifier: Apache-2.0
"""The command that repeats a run, for reports and model cards."""

import shlex
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any, Literal

from keylayers.commands.config import taken_from_ranking
from keylayers.commands.options import option_fields
from keylayers.ranking.ranking import FILE, Ranking, ranking_file
from keylayers.report.model_card import model_card

Command = Literal["rank", "train", "prune"]


def command_line(
    command: Command, options: Mapping[str, Any], ranked_with: Mapping[str, Any] | None = None
) -> str:
    """`keylayers ...` in the words of a shell, with every flag that the run needs.

    Options at their default are left out, unless the ranking (made `ranked_with` those options)
    would set another value, and so are options that the ranking sets to the same value.
    """
    taken = taken_from_ranking(command) if options.get("ranking") is not None else ()
    words = ["keylayers", command]
    for name, option in option_fields(command).items():
        value = options.get(name)
        default = (ranked_with or {}).get(name, MISSING) if name in taken else option.default
        value, default = (list(v) if isinstance(v, tuple) else v for v in (value, default))
        if value is not None and value != default:
            words += flag_words(name, value)
    return shlex.join(words)


def flag_words(name: str, value: Any) -> list[str]:
    """An option in the words of a command line."""
    flag = "--" + name.rstrip("_").replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    parts = value if isinstance(value, (list, tuple)) else [value]
    if any(str(part).startswith("-") for part in parts):  # or it could pass for another flag
        return [f"{flag}={part}" for part in parts]
    return [flag, *map(str, parts)] if parts else []


def how_to_repeat(ranking: Ranking, path: str) -> str:
    """The command that writes the ranking to `path`, or the call where it was made from Python."""
    made_by = ranking.made_by
    options = made_by.options.given
    if options.get("rank_first"):
        return command_line("train", options)
    if "data" in options and "model" in options:
        file = ranking_file(path)
        is_of_rank = file.name == FILE
        where = flag_words("output", str(file.parent)) if is_of_rank else []
        return f"{command_line('rank', options)} {shlex.join(where)}".rstrip()
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


def card_of(command: Command, record: Mapping[str, Any], ranking: Ranking | None) -> str:
    """The model card of a result, with the commands that made its ranking and itself."""
    options = record["options"]
    if ranking is None or options.get("rank_first"):
        commands = command_line(command, options)
    else:
        own = command_line(command, options, ranking.made_by.options.given)
        commands = f"{how_to_repeat(ranking, options['ranking'])}\n{own}"
    return model_card(record, ranking, commands)
