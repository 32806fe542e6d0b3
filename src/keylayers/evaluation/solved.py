# SPDX-License-Identifier: Apache-2.0
"""Problems that were solved, from samples: pass@k and majority@k, problem by problem."""

import math
from collections.abc import Callable, Mapping, Sequence

import pandas as pd

from keylayers.evaluation.documents import Measured
from keylayers.evaluation.pass_at_k import counts_up_to, majority_at_k, pass_at_k, votes
from keylayers.evaluation.problems import Problem
from keylayers.evaluation.sampling import Sample


def solved(
    name: str,
    problems: Sequence[Problem],
    samples: Mapping[tuple[str, int], Sample],
    num_samples: int,
    are_same: Callable[[str, str], bool],
) -> Measured:
    """What the first `num_samples` samples of each problem are worth.

    Args:
        name: Of the set of problems.
        problems: All of it.
        samples: By hash of the problem and number of the sample.
        num_samples: How many count; all of them must be there.
        are_same: Whether two answers are the same.
    """
    counts = counts_up_to(num_samples)
    rows, used = [], []
    for document, problem in enumerate(problems):
        key = problem.sha256()
        own = [samples[key, number] for number in range(num_samples)]
        used += own
        is_right = [one.is_right for one in own]
        found = votes([one.answer for one in own], is_right, are_same)
        worth = {f"pass@{k}": pass_at_k(num_samples, sum(is_right), k) for k in counts}
        worth |= {f"majority@{k}": majority_at_k(found, k, key) for k in counts if k > 2}
        rows += [
            {
                "task": name,
                "metric": metric,
                "document": document,
                "document_sha256": key[:16],
                "value": value,
                "size": 1.0,
                "chance": math.nan,
            }
            for metric, value in worth.items()
        ]
    table = pd.DataFrame(rows)
    totals = table.groupby("metric", sort=False)["value"].mean().to_dict()
    return Measured(
        task=name,
        rows=table,
        totals=totals,
        higher_is_better=dict.fromkeys(totals, True),
        facts={
            "num_samples": len(used),
            "num_unanswered": sum(one.answer is None for one in used),
            "num_cut": sum(one.is_cut for one in used),
            "num_out_of_time": sum(one.is_out_of_time for one in used),
            "mean_tokens": sum(one.num_tokens for one in used) / len(used),
        },
    )
