# SPDX-License-Identifier: Apache-2.0
"""What k answers to a problem are worth: any of them right, or the most frequent one right.

pass@k is the chance that at least one of k answers is right, without bias from n >= k answers of
which c are right: 1 - C(n - c, k) / C(n, k).
majority@k is the chance that the most frequent of k answers is right, averaged over sets of k of
the n answers: over all of them, or over 1,000 drawn ones where there are more. Unanswered texts do
not vote; of several answers that are as frequent, each wins as often.

Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", arXiv:2107.03374,
equation 1; Wang et al. 2022, "Self-Consistency Improves Chain of Thought Reasoning in Language
Models", arXiv:2203.11171.
Needs no torch.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import combinations

NUM_SETS = 1000


def counts_up_to(num_samples: int) -> list[int]:
    """1, 2, 4 and so on, up to `num_samples`, which is one of them."""
    counts = [2**power for power in range(num_samples.bit_length()) if 2**power < num_samples]
    return [*counts, num_samples]


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The chance that one of k answers is right.

    Args:
        num_samples: How many answers there are, n.
        num_right: How many of these are right, c.
        k: At most n.
    """
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def votes(
    answers: Sequence[str | None], is_right: Sequence[bool], are_same: Callable[[str, str], bool]
) -> list[int | None]:
    """Answers as votes: equal ones have one number, the right ones 0, unanswered texts None.

    Args:
        answers: To one problem.
        is_right: Of each.
        are_same: Whether two answers that are not right are the same.
    """
    wrong: list[str] = []
    found: list[int | None] = []
    for answer, right in zip(answers, is_right, strict=True):
        if answer is None or right:
            found.append(None if answer is None else 0)
            continue
        same = next((index for index, one in enumerate(wrong) if are_same(one, answer)), None)
        if same is None:
            wrong.append(answer)
            same = len(wrong) - 1
        found.append(same + 1)
    return found


def majority_at_k(found: Sequence[int | None], k: int, seed: str) -> float:
    """The chance that the most frequent of k answers is right.

    Args:
        found: From `votes`.
        k: At most their number.
        seed: Of the sets of k, where not all are looked at.
    """
    sets: Iterable[Sequence[int | None]]
    if math.comb(len(found), k) <= NUM_SETS:
        sets = combinations(found, k)
    else:
        draw = random.Random(f"{seed} {k}")
        sets = (draw.sample(list(found), k) for _ in range(NUM_SETS))
    shares = [_share(one) for one in sets]
    return sum(shares) / len(shares)


def _share(drawn: Sequence[int | None]) -> float:
    """How often the right answer wins this vote."""
    counts = Counter(one for one in drawn if one is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    return (counts[0] == most) / sum(count == most for count in counts.values())
