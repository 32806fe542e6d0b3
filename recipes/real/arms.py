# SPDX-License-Identifier: Apache-2.0
"""The data sets of the study, and which modules each of its arms trains. Needs no torch."""

import random
from dataclasses import dataclass

from keylayers.ranking.budget import Time
from keylayers.ranking.ranking import Ranking

RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # times keylayers' default


@dataclass(frozen=True)
class Task:
    """A data set: what is trained on, what is measured, and what may be forgotten meanwhile."""

    train: str
    test: str | None = None  # None: the last examples of `train`
    labels: tuple[str, ...] = ()  # of a classification
    forgets: str = "alpaca"
    max_length: int = 64
    num_train: int | None = None  # examples to train on, from the beginning; None: all
    num_test: int = 500


TASKS = {
    "trec": Task(
        "tasks/trec_train.jsonl",
        "tasks/trec_test.jsonl",
        ("abbreviation", "description", "entity", "number", "person", "place"),
    ),
    "sst2": Task("tasks/sst2_train.jsonl", "tasks/sst2_test.jsonl", ("negative", "positive")),
    "alpaca": Task(
        "sft/alpaca_gpt4_999.json", forgets="trec", max_length=96, num_train=850, num_test=100
    ),
    "code": Task("tasks/code_alpaca_2k.json", max_length=96, num_train=1800, num_test=100),
}


@dataclass(frozen=True)
class Arm:
    """Which modules are trained: `size` of an order of all, at LoRA's rank or of all's size."""

    order: str  # all, best, worst, retrain, random, first, last, mlp, time
    size: float = 1.0
    is_of_all_parameters: bool = False  # a higher LoRA rank, for as many parameters as `all` has
    draw: int = 0  # of a random set

    @property
    def name(self):
        """Its name in results."""
        more = ", as many parameters" if self.is_of_all_parameters else ""
        return f"{self.order} {self.size:g}{more}" + (f" #{self.draw}" if self.draw else "")

    def modules(self, ranked, seed, made_by=None, to_retrain=None):
        """Names of the modules, in model order.

        `ranked` has elimination's scores, `to_retrain` the gradient-path of each of its modules.
        """
        names = [module.name for module in ranked]
        if self.order == "time":
            ranking = Ranking(ranked, "elimination", provenance=made_by)
            return [*ranking.select(Time(self.size)).names]
        count = round(self.size * len(names))
        by_score = [module.name for module in sorted(ranked, key=lambda one: -one.score)]
        shuffled = random.Random(f"{self.order} {seed} {self.draw}").sample(names, len(names))
        order = {
            "all": names,
            "best": by_score,
            "worst": by_score[::-1],
            "retrain": sorted(names, key=lambda name: -(to_retrain or {}).get(name, 0.0)),
            "random": shuffled,
            "first": names,
            "last": names[::-1],
            "mlp": [name for name in shuffled if ".mlp." in name],
        }[self.order]
        chosen = set(order[:count])
        return [name for name in names if name in chosen]


TIERS = (
    (Arm("all"), Arm("best", 0.3), Arm("random", 0.3), Arm("best", 0.1), Arm("random", 0.1)),
    (Arm("best", 0.75), Arm("random", 0.75), Arm("worst", 0.75)),
    tuple(Arm(order, size, True) for order in ("best", "random") for size in (0.3, 0.1)),
    tuple(Arm(order, size) for size in (0.3, 0.1) for order in ("worst", "first", "last", "mlp")),
    (Arm("time", 0.6),),
    (Arm("retrain", 0.3), Arm("retrain", 0.1)),
)


def next_rate(tried, rates=None):
    """The learning rate to try next; None once the best one has a worse one on either side."""
    for rate in rates or (1.0, 2.0):
        if rate not in tried:
            return rate
    if rates:
        return None
    place = RATES.index(min(tried, key=tried.get))
    around = RATES[max(0, place - 1) : place + 2]
    return next((rate for rate in around if rate not in tried), None)
