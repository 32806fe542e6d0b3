# SPDX-License-Identifier: Apache-2.0
"""When scoring may stop: the selection at the wanted budget no longer changes."""

from collections.abc import Sequence


class StableSelection:
    """Watches which gates are the best `fraction` as scores come in.

    The selection is stable when it has been the same as before `patience` times in a row.
    """

    def __init__(self, fraction: float, patience: int) -> None:
        self.fraction = fraction
        self.patience = patience
        self.num_unchanged = 0
        self._selected: frozenset[int] | None = None

    def see(self, scores: Sequence[float]) -> bool:
        """Take in the newest scores; returns whether the selection is stable.

        Ties go by gate order.
        """
        size = max(1, int(self.fraction * len(scores) + 0.5))
        ordered = sorted(range(len(scores)), key=lambda gate: -scores[gate])
        selected = frozenset(ordered[:size])
        self.num_unchanged = self.num_unchanged + 1 if selected == self._selected else 0
        self._selected = selected
        return self.num_unchanged >= self.patience
