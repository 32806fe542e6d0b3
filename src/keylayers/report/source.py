# SPDX-License-Identifier: Apache-2.0
"""Rankings from files, named apart, with the verifications beside them. Needs no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from keylayers.errors import ConfigError
from keylayers.ranking.budget import WrittenBudget
from keylayers.ranking.ranked_module import are_best
from keylayers.ranking.ranking import FILE, Ranking
from keylayers.ranking.verification import Verification, verification_file


@dataclass(frozen=True)
class Source:
    """One ranking and where it comes from.

    Attributes:
        path: As it was given.
        label: The shortest end of the path that tells it from the others.
        ranking: The ranking.
        verification: Its own; None if it was not verified.
        is_stale: There is a verification, but of an earlier ranking.
    """

    path: str
    label: str
    ranking: Ranking
    verification: Verification | None = None
    is_stale: bool = False


def load_sources(paths: Sequence[Path]) -> list[Source]:
    """The rankings with their verifications.

    Raises:
        RankingError: a file is missing, damaged or of another kind.
    """
    return [_load(path, label) for path, label in zip(paths, labels(paths), strict=True)]


def num_best(ranking: Ranking, budget: WrittenBudget) -> int:
    """How many modules the budget takes; pictures show those that it takes as the best ones.

    Raises:
        ConfigError: the budget has no known form, buys nothing or more than there is, or goes by
            cost and takes others than the best.
        RankingError: the budget reaches modules that have no score.
    """
    chosen = ranking.select(budget).modules
    if not are_best(ranking.modules, chosen):
        raise ConfigError(
            f"`budget` of a report or figure must take the best modules, as 0.3, 17 and "
            f"0.3x-params do, but {budget} goes by cost and takes others; give a number of modules"
        )
    return len(chosen)


def labels(paths: Sequence[Path]) -> list[str]:
    """A name for each path: as many of its last parts as tell all apart; the file's only if needed.

    A path that is given twice gets a number.
    """
    parts = [_parts(path) for path in paths]
    longest = max(len(one) for one in parts)
    for length in range(1, longest + 1):
        names = ["/".join(one[-length:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {'/'.join(one)}" for number, one in enumerate(parts, start=1)]


def _parts(path: Path) -> tuple[str, ...]:
    """The folder that holds ranking.json, or the file without its ending."""
    path = path.absolute()
    if path.name == FILE and len(path.parts) > 2:
        return path.parent.parts[1:]
    return path.with_suffix("").parts[1:] if path.suffix == ".json" else path.parts[1:]


def _load(path: Path, label: str) -> Source:
    ranking = Ranking.load(path)
    file = verification_file(path)
    if not file.is_file():
        return Source(str(path), label, ranking)
    found = Verification.load(file)
    if found.is_of(ranking):
        return Source(str(path), label, ranking, found)
    return Source(str(path), label, ranking, is_stale=True)
