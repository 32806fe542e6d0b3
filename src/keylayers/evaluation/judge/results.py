# SPDX-License-Identifier: Apache-2.0
"""What the judge's replies say about the models: means, differences, wins. Needs no torch.

A question is the unit: intervals are bootstraps over questions, and models are compared on the same
ones. The value of a question is the mean over its turns, and only questions count of which every
turn could be read; a reply that could not be read, or is missing, is in no mean and is counted. A
difference is shown only if its interval leaves out 0 and so does a test that flips the signs of the
questions' differences, corrected for the number of differences (evaluation/statistics.py).

In pairs a win counts only if both orders agree; orders that disagree are a tie (Zheng et al. 2023,
arXiv 2306.05685).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from keylayers.evaluation.judge.client import Reply
from keylayers.evaluation.judge.questions import Question, QuestionSet
from keylayers.evaluation.judge.requests import JudgeRequest
from keylayers.evaluation.judge.verdicts import read_rating, read_verdict
from keylayers.evaluation.statistics import Documents, difference_interval, holm, sign_flip_p

SIGNIFICANCE = 0.05
WHOLE = "all"  # the part that is all turns of all questions
CATEGORY = "category "  # begins the name of a part that is one

# Value of a model's answer to a turn of a question; None where it is not known.
Values = Mapping[tuple[str, int | str, int], float | None]
TurnsOf = Callable[[Question], tuple[int, ...]]
Part = tuple[str, TurnsOf]


def single_results(
    asked: QuestionSet,
    labels: Sequence[str],
    requests: Sequence[JudgeRequest],
    replies: Mapping[str, Reply],
) -> dict[str, Any]:
    """Mean ratings of each model by turn and category, and differences to the first one.

    Args:
        asked: The questions.
        labels: The models.
        requests: All that were to be asked.
        replies: Key -> reply, where there is one.
    """
    ratings: dict[tuple[str, int | str, int], float | None] = {}
    models: dict[str, dict[str, Any]] = {
        label: {"num_requests": 0, "num_unread": 0, "num_without_reply": 0} for label in labels
    }
    for one in requests:
        counts, reply = models[one.models[0]], replies.get(one.key)
        rating = None if reply is None else read_rating(reply)
        ratings[(one.models[0], one.question_id, one.turn)] = rating
        counts["num_requests"] += 1
        counts["num_without_reply"] += reply is None
        counts["num_unread"] += reply is not None and rating is None
    for label in labels:
        models[label]["ratings"] = {
            name: _mean(_values(asked, label, ratings, turns)) for name, turns in _parts(asked)
        }
    differences = {
        label: {
            name: _difference(
                _values(asked, label, ratings, turns), _values(asked, labels[0], ratings, turns)
            )
            for name, turns in _parts(asked)
        }
        for label in labels[1:]
    }
    _mark_shown(list(differences.values()))
    return {"models": models, "beside": labels[0], "differences": differences}


def pairwise_results(
    asked: QuestionSet,
    labels: Sequence[str],
    requests: Sequence[JudgeRequest],
    replies: Mapping[str, Reply],
) -> dict[str, Any]:
    """Wins, ties and losses of each model against the first one.

    Args:
        asked: The questions.
        labels: The models.
        requests: All that were to be asked: each pair in both orders.
        replies: Key -> reply, where there is one.
    """
    shown = {(one.models, one.question_id, one.turn): replies.get(one.key) for one in requests}
    first = labels[0]
    pairs = {label: _pair(asked, first, label, shown) for label in labels[1:]}
    _mark_shown(
        [{name: one["gain"] for name, one in pair["outcomes"].items()} for pair in pairs.values()]
    )
    return {"beside": first, "pairs": pairs}


def _pair(
    asked: QuestionSet,
    first: str,
    label: str,
    shown: Mapping[tuple[tuple[str, ...], int | str, int], Reply | None],
) -> dict[str, Any]:
    """Everything about one model against the first one."""
    gains: dict[tuple[str, int | str, int], float | None] = {}
    counts = dict.fromkeys(
        ("num_comparisons", "num_unread", "num_without_reply", "num_disagreeing"), 0
    )
    counts |= dict.fromkeys(("num_first_shown_twice", "num_second_shown_twice"), 0)
    for question in asked.questions:
        for turn in range(1, len(question.turns) + 1):
            name = question.question_id
            pair = [shown[(models, name, turn)] for models in ((first, label), (label, first))]
            verdicts = [None if one is None else read_verdict(one) for one in pair]
            counts["num_comparisons"] += 1
            counts["num_without_reply"] += None in pair
            counts["num_unread"] += None not in pair and None in verdicts
            gain = None if None in verdicts else _gain(verdicts[0], verdicts[1])
            gains[(label, name, turn)] = gain
            counts["num_disagreeing"] += gain is not None and _disagree(verdicts)
            counts["num_first_shown_twice"] += verdicts == ["A", "A"]
            counts["num_second_shown_twice"] += verdicts == ["B", "B"]
    parts = {name: _outcomes(asked, label, gains, turns) for name, turns in _parts(asked)}
    return {**counts, "outcomes": parts}


def _gain(shown_second: Any, shown_first: Any) -> float:
    """1 if the model wins in both orders, -1 if it loses in both, else 0."""
    if (shown_second, shown_first) == ("B", "A"):
        return 1.0
    return -1.0 if (shown_second, shown_first) == ("A", "B") else 0.0


def _disagree(verdicts: Sequence[Any]) -> bool:
    return tuple(verdicts) not in (("A", "B"), ("B", "A"), ("C", "C"))


def _outcomes(asked: QuestionSet, label: str, gains: Values, turns: TurnsOf) -> dict[str, Any]:
    """Wins, ties and losses of one part, and the mean gain over its questions."""
    found = [
        gain
        for question in asked.questions
        for turn in turns(question)
        if (gain := gains[(label, question.question_id, turn)]) is not None
    ]
    values = _values(asked, label, gains, turns)
    none = dict.fromkeys(values, 0.0)
    return {
        "wins": found.count(1.0),
        "ties": found.count(0.0),
        "losses": found.count(-1.0),
        "gain": _difference(values, none),
    }


def _parts(asked: QuestionSet) -> list[Part]:
    """Name of each part that results are shown for, and the turns of a question that are in it."""

    def every(question: Question) -> tuple[int, ...]:
        return tuple(range(1, len(question.turns) + 1))

    def only(turn: int) -> TurnsOf:
        return lambda question: (turn,) if turn <= len(question.turns) else ()

    def within(category: str) -> TurnsOf:
        return lambda question: every(question) if question.category == category else ()

    turns = range(1, asked.num_turns + 1) if asked.num_turns > 1 else ()
    return [
        (WHOLE, every),
        *((f"turn {turn}", only(turn)) for turn in turns),
        *((f"{CATEGORY}{category}", within(category)) for category in asked.categories),
    ]


def _values(
    asked: QuestionSet,
    label: str,
    values: Values,
    turns: TurnsOf,
) -> dict[int | str, float]:
    """Question -> mean over its turns in a part, where all of these are known."""
    found = {}
    for question in asked.questions:
        known = [values[(label, question.question_id, turn)] for turn in turns(question)]
        whole = [one for one in known if one is not None]
        if whole and len(whole) == len(known):
            found[question.question_id] = sum(whole) / len(whole)
    return found


def _mean(values: Mapping[int | str, float]) -> dict[str, Any]:
    """Mean with its interval, and of how many questions; nothing of none."""
    if not values:
        return {"num_questions": 0, "mean": None, "low": None, "high": None}
    documents = _documents(list(values.values()))
    found = difference_interval(documents)
    return {
        "num_questions": len(values),
        "mean": documents.mean(),
        "low": None if found is None else found.low,
        "high": None if found is None else found.high,
    }


def _difference(
    values: Mapping[int | str, float], others: Mapping[int | str, float]
) -> dict[str, Any]:
    """The mean difference on the questions that both have, and how likely it is by chance."""
    pairs = {name: value - others[name] for name, value in values.items() if name in others}
    p_value = sign_flip_p(_documents(list(pairs.values()))) if pairs else None
    return _mean(pairs) | {"p_value": p_value}


def _mark_shown(by_model: Sequence[dict[str, dict[str, Any]]]) -> None:
    """Say of each difference whether it is shown, by p-values corrected for their number.

    Those of whole turns stand in one table and are corrected together, and so are those of
    categories, which are in the record alone.
    """
    cells = [(name, one) for parts in by_model for name, one in parts.items()]
    for is_category in (False, True):
        family = [one for name, one in cells if name.startswith(CATEGORY) == is_category]
        known = [one for one in family if one["p_value"] is not None]
        for one in family:
            one["corrected_p_value"], one["is_shown"] = None, False
        for one, p_value in zip(known, holm([one["p_value"] for one in known]), strict=True):
            one["corrected_p_value"] = p_value
            is_beyond = one["low"] is not None and not one["low"] <= 0 <= one["high"]
            one["is_shown"] = is_beyond and p_value < SIGNIFICANCE


def _documents(values: Sequence[float]) -> Documents:
    """One stratum of questions that weigh the same."""
    return Documents(
        values=np.array(values),
        sizes=np.ones(len(values)),
        strata=np.zeros(len(values), dtype=int),
        weights=np.ones(1),
    )
