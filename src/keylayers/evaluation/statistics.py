# SPDX-License-Identifier: Apache-2.0
"""What documents say about a model and about the difference of two: means, intervals, tests.

A measure is a mean over documents. Documents belong to strata (the tasks of a group) with weights:

    value = sum over strata s of weight_s * (sum of value_i in s) / (sum of size_i in s)

Intervals are 95 % and describe another draw of documents, not other training seeds. A share of
right answers on one task has the exact binomial interval (Clopper and Pearson 1934); other means
have the percentile interval of a bootstrap within each stratum (Efron 1979). Two models are
compared document by document. A difference counts as shown only if its interval excludes 0 and a
test that flips the signs of the documents' differences agrees (Fisher's randomisation test; for
right and wrong answers it is McNemar's exact test): the bootstrap alone is overconfident if few
documents differ.

Blind to: documents that depend on each other, such as several questions about one text.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy import stats

LEVEL = 0.95
NUM_RESAMPLES = 9999
MAX_DRAWN = 10_000_000  # numbers in memory at once


@dataclass(frozen=True)
class Documents:
    """One measure of one model, document by document."""

    values: Float[ndarray, " document"]  # what is summed
    sizes: Float[ndarray, " document"]  # what the sum is divided by: 1 each, or tokens
    strata: Int[ndarray, " document"]  # index of the stratum
    weights: Float[ndarray, " stratum"]  # they sum to 1

    def mean(self) -> float:
        """The measure."""
        return float(self.parts().sum())

    def less(self, other: "Documents") -> "Documents":
        """The difference to `other`, measured on the same documents."""
        return replace(self, values=self.values - other.values)

    def parts(self) -> Float[ndarray, " document"]:
        """What each document contributes to the measure, as summands."""
        totals = np.bincount(self.strata, self.sizes, len(self.weights))
        return self.values * (self.weights / totals)[self.strata]


@dataclass(frozen=True)
class Interval:
    """A 95 % interval, and the method behind it."""

    low: float
    high: float
    method: str

    def holds(self, value: float) -> bool:
        """Whether the interval contains the value."""
        return self.low <= value <= self.high


def interval(documents: Documents, seed: int = 0) -> Interval | None:
    """The interval of a measure; None if a stratum has fewer than two documents."""
    values, num = documents.values, len(documents.values)
    is_share = len(documents.weights) == 1 and np.all(documents.sizes == 1)
    if is_share and num > 1 and np.all((values == 0) | (values == 1)):
        exact = stats.binomtest(int(values.sum()), num).proportion_ci(LEVEL, "exact")
        return Interval(float(exact.low), float(exact.high), "exact")
    return difference_interval(documents, seed)


def difference_interval(documents: Documents, seed: int = 0) -> Interval | None:
    """The interval of a difference: always by bootstrap, because a difference is not a share."""
    values, sizes, weights = documents.values, documents.sizes, documents.weights
    members = [np.flatnonzero(documents.strata == stratum) for stratum in range(len(weights))]
    if min(map(len, members)) < 2:
        return None
    if all(np.ptp(values[own]) == 0 == np.ptp(sizes[own]) for own in members):
        mean = documents.mean()  # of every draw of the documents
        return Interval(mean, mean, "bootstrap")

    def means(*drawn: ndarray, axis: int) -> ndarray:
        parts = [values[own].sum(axis) / sizes[own].sum(axis) for own in drawn]
        return np.asarray(sum(weight * part for weight, part in zip(weights, parts, strict=True)))

    found = stats.bootstrap(
        members,
        means,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, MAX_DRAWN // len(values)),
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(found.low), float(found.high), "bootstrap")


def sign_flip_p(documents: Documents, seed: int = 0) -> float:
    """The p-value of "no difference", two-sided, by flipping signs of the documents' differences.

    Exact if all differences have the same size (McNemar's test) or are few; otherwise from 9,999
    random flips.
    """
    parts = documents.parts()
    parts = parts[parts != 0]
    if len(parts) == 0:
        return 1.0
    # No absolute tolerance: a document's part of a loss is its nats divided by all tokens.
    if np.allclose(np.abs(parts), abs(parts[0]), rtol=1e-9, atol=0):
        return float(stats.binomtest(int((parts > 0).sum()), len(parts)).pvalue)
    found = stats.permutation_test(
        (parts,),
        lambda flipped, axis: flipped.sum(axis=axis),
        permutation_type="samples",
        n_resamples=NUM_RESAMPLES,
        batch=max(1, MAX_DRAWN // len(parts)),
        vectorized=True,
        rng=np.random.default_rng(seed),
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number (Holm 1979), in the order given."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    corrected = np.empty(len(p_values))
    corrected[order] = np.maximum.accumulate(factors * np.asarray(p_values)[order]).clip(max=1)
    return corrected.tolist()
