# SPDX-License-Identifier: Apache-2.0
"""What judging will cost at most, before anything is asked. Needs no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from keylayers.evaluation.judge.options import EndpointOptions
from keylayers.evaluation.judge.requests import JudgeRequest

MILLION = 1e6


@dataclass(frozen=True)
class Estimate:
    """Requests that are still to be asked, and their tokens.

    Attributes:
        num_requests: Of the whole run, each once.
        num_kept: Replies that are there already.
        num_missing_answers: Answers not given yet, which count at their longest.
        prompt_tokens: Of what is still to be asked, counted by the judged models' tokenizer.
        completion_tokens: The most that the judge may write.
        price: The most that this costs; None without prices.
    """

    num_requests: int
    num_kept: int
    num_missing_answers: int
    prompt_tokens: int
    completion_tokens: int
    price: float | None

    @property
    def num_to_ask(self) -> int:
        """Requests that are still to be asked."""
        return self.num_requests - self.num_kept


def estimate(
    requests: Sequence[JudgeRequest],
    kept: frozenset[str],
    count_tokens: Callable[[str], int],
    max_new_tokens: int,
    options: EndpointOptions,
) -> Estimate:
    """What the requests cost whose replies are not there.

    Args:
        requests: Each once.
        kept: Keys of the replies that are there.
        count_tokens: Of a text.
        max_new_tokens: Longest answer, for those that are not given yet.
        options: The judge's limit and prices.
    """
    new = [one for one in requests if one.num_missing or one.key not in kept]
    missing = sum(one.num_missing for one in new)
    prompt = sum(count_tokens(one.prompt) for one in new) + missing * max_new_tokens
    completion = len(new) * options.judge_max_tokens
    price = None
    if options.judge_price_input is not None and options.judge_price_output is not None:
        price = (
            prompt * options.judge_price_input + completion * options.judge_price_output
        ) / MILLION
    return Estimate(
        num_requests=len(requests),
        num_kept=len(requests) - len(new),
        num_missing_answers=missing,
        prompt_tokens=prompt,
        completion_tokens=completion,
        price=price,
    )
