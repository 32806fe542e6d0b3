# SPDX-License-Identifier: Apache-2.0
"""The commands of a study that are to be checked: those of many cells differ in a seed alone."""

from collections.abc import Iterable, Iterator, Sequence

from keylayers.commands.study.plan import Cell

# Any text will do as their value, and nothing else depends on it.
NAMES = (*("--model", "--revision", "--data", "--stage-1", "--adapter", "--tuned", "--checkpoint"),)
# Their values are checked by themselves, and never together with those of other options.
NUMBERS = ("--seed", "--mask-seed", "--max-steps", "--steps")


def distinct_commands(cells: Iterable[Cell]) -> Iterator[tuple[str, ...]]:
    """Commands that hold between them all that is to be checked of those of the cells.

    That is every value of every option, and every combination of values of options that depend on
    each other. Left out are commands with a ranking, which is not there yet.
    """
    values: set[tuple[str, ...]] = set()
    combinations: set[tuple[tuple[str, ...], ...]] = set()
    for cell in cells:
        for words in cell.commands:
            if "--ranking" in words:
                continue
            options = [one[:1] if one[0] in NAMES else one for one in _options(words[1:])]
            decisive = (words[:1], *(one[:1] if one[0] in NUMBERS else one for one in options))
            if decisive not in combinations or not values.issuperset(options):
                yield words
            values.update(options)
            combinations.add(decisive)


def _options(words: Sequence[str]) -> list[tuple[str, ...]]:
    """Each flag with its values."""
    found: list[tuple[str, ...]] = []
    for word in words:
        if word.startswith("--"):
            found.append((word,))
        else:
            found[-1] += (word,)
    return found
