# SPDX-License-Identifier: Apache-2.0
"""How the modules are scored."""

from dataclasses import dataclass, fields

from keylayers.errors import ConfigError
from keylayers.options.choices import METHOD_OPTIONS, Granularity, MaskOptimizer, Method
from keylayers.ranges import MAX_PRICE, MAX_SCORE, check_above_zero, check_at_least, check_seed


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """How the modules are scored, with everything else frozen.

    Attributes:
        method: elimination pays each update its share of the loss reduction in nats, in rounds that
            keep ever fewer modules; ila learns a gate for each module as published; path is one
            round of elimination; price learns gates that cost something. The others are known
            rankings to compare with: docs/methods.md.
        granularity: One gate for each module, for each block, or for each projection (elimination,
            path, price, ila, leave-one-out, shapley).
        mask_batches: Batches that a method looks at; elimination takes so many in each round.
        path_points: Points of the integral from no update to all (path).
        keep_fraction: Share of the modules that a round of elimination keeps for the next.
        permutations: Random orders that Shapley values are averaged over (shapley).
        mask_steps: Gradient steps on the scores, one batch each (ila, price); training steps
            (adalora).
        mask_optimizer: Plain gradient descent (sgd) or adam (ila, price). The paper's is not known
            to us.
        mask_learning_rate: Of the scores (ila, price). Not given: 10 for sgd, 0.05 for adam.
        initial_score: Every score at first; the gate is its sigmoid, so 1 is a gate of 0.73 (ila).
        price: Of the mean gate, in nats (price).
        until_stable: Let the selection decide when to stop: when the best share so large, such as
            0.3, has not changed for 10 steps (ila, price; `mask_steps` is the cap), or over two
            more runs on other batches, all averaged (elimination, path; ten runs are the cap).
        mask_seed: Of the order of the mask's batches. Not given: the training's seed.
    """

    method: Method = "elimination"
    granularity: Granularity = "module"
    mask_batches: int = 4
    path_points: int = 4
    keep_fraction: float = 0.7
    permutations: int = 8
    mask_steps: int = 60
    mask_optimizer: MaskOptimizer = "sgd"
    mask_learning_rate: float | None = None
    initial_score: float = 1.0  # the paper tries 4, 2 and 1 (from memory of its text)
    price: float = 2.0
    until_stable: float | None = None
    mask_seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("mask_batches", "path_points", "permutations", "mask_steps"):
            check_at_least(name, getattr(self, name), 1)
        self._refuse_options_without_effect()
        if not 0 < self.keep_fraction < 1:
            raise ConfigError(
                f"`keep_fraction` must be above 0 and below 1, got {self.keep_fraction}"
            )
        if not 0 <= self.price <= MAX_PRICE:
            raise ConfigError(f"`price` must be from 0 to {MAX_PRICE:g} nats, got {self.price}")
        if not abs(self.initial_score) <= MAX_SCORE:
            raise ConfigError(
                f"`initial_score` must be from -{MAX_SCORE} to {MAX_SCORE}, where its gate is open "
                f"or closed to float32's precision, got {self.initial_score}"
            )
        if self.method == "adalora":
            check_at_least("mask_steps", self.mask_steps, 2)  # its budget falls between two steps
        if self.mask_seed is not None:
            check_seed("mask_seed", self.mask_seed)
        if self.until_stable is not None and not 0 < self.until_stable < 1:
            raise ConfigError(
                f"`until_stable` must be a share above 0 and below 1, got {self.until_stable}"
            )
        if self.mask_learning_rate is not None:
            check_above_zero("mask_learning_rate", self.mask_learning_rate)

    def _refuse_options_without_effect(self) -> None:
        own = ("method", "mask_seed", *METHOD_OPTIONS[self.method])
        for field in fields(self):
            if field.name not in own and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"`{field.name}` must be left out with `method` {self.method}: it has no "
                    f"effect there"
                )

    @property
    def resolved_learning_rate(self) -> float:
        """The learning rate that is used; experiments/LOG.md has the runs behind the defaults."""
        if self.mask_learning_rate is not None:
            return self.mask_learning_rate
        return {"sgd": 10.0, "adam": 0.05}[self.mask_optimizer]
