# SPDX-License-Identifier: Apache-2.0
"""From replies to numbers: means, differences, wins, what is not read, and what it costs."""

import random

import pytest


def asked(num_questions=2, num_turns=2, categories=("math", "writing")):
    from keylayers.evaluation.judge.questions import Question, QuestionSet

    turns = tuple(f"turn {i}" for i in range(num_turns))
    none = (None,) * num_turns
    return QuestionSet(
        tuple(
            Question(i, categories[i % len(categories)], turns, none) for i in range(num_questions)
        ),
        {},
    )


def planned(questions, labels, mode="single", said=None):
    from keylayers.evaluation.judge.options import EndpointOptions
    from keylayers.evaluation.judge.requests import requests_for

    options = EndpointOptions(judge_url="http://host", judge_model="m", mode=mode)
    if said is None:
        said = {
            label: {
                one.question_id: tuple(f"{label} {one.question_id} {i}" for i in range(9))
                for one in questions.questions
            }
            for label in labels
        }
    return requests_for(questions, labels, said, options)


def replied(requests, say):
    """Key -> reply; `say` gives the words for a request, or None for no reply."""
    from keylayers.evaluation.judge.client import Reply

    found = {one.key: say(one) for one in requests}
    return {key: Reply(text, "stop", 1, 1) for key, text in found.items() if text is not None}


def single(questions, labels, say):
    from keylayers.evaluation.judge.results import single_results

    requests = planned(questions, labels)
    return single_results(questions, labels, requests, replied(requests, say))


def pairwise(questions, labels, say):
    from keylayers.evaluation.judge.results import pairwise_results

    requests = planned(questions, labels, "pairwise")
    return pairwise_results(questions, labels, requests, replied(requests, say))


RATINGS = {  # model, question, turn -> rating
    ("base", 0, 1): 2, ("base", 0, 2): 4, ("base", 1, 1): 6, ("base", 1, 2): 8,
    ("mine", 0, 1): 3, ("mine", 0, 2): 5, ("mine", 1, 1): 9, ("mine", 1, 2): 9,
}  # fmt: skip


def rate(request):
    return f"[[{RATINGS[(request.models[0], request.question_id, request.turn)]}]]"


def test_means_and_differences_are_those_worked_out_by_hand():
    found = single(asked(), ["base", "mine"], rate)
    ratings = found["models"]["base"]["ratings"]
    means = {name: one["mean"] for name, one in ratings.items()}
    assert means == {
        "all": 5.0,
        "turn 1": 4.0,
        "turn 2": 6.0,
        "category math": 3.0,
        "category writing": 7.0,
    }
    assert ratings["all"]["num_questions"] == 2
    assert found["beside"] == "base"
    difference = found["differences"]["mine"]
    assert difference["all"]["mean"] == pytest.approx(1.5)  # of 1 and 2
    assert difference["turn 1"]["mean"] == pytest.approx(2.0)
    assert difference["category math"]["mean"] == pytest.approx(1.0)
    assert not difference["all"]["is_shown"]  # two questions show nothing


def test_an_interval_covers_the_mean_and_is_that_of_the_questions():
    draw = random.Random(0)
    ratings = {i: draw.randint(1, 10) for i in range(80)}
    found = single(asked(80), ["base"], lambda one: f"[[{ratings[one.question_id]}]]")
    whole = found["models"]["base"]["ratings"]["all"]
    mean = sum(ratings.values()) / 80
    spread = (sum((one - mean) ** 2 for one in ratings.values()) / 80) ** 0.5
    assert whole["mean"] == pytest.approx(mean)
    assert whole["low"] == pytest.approx(mean - 1.96 * spread / 80**0.5, abs=0.1)
    assert whole["high"] == pytest.approx(mean + 1.96 * spread / 80**0.5, abs=0.1)


def test_a_planted_difference_is_shown_and_noise_is_not():
    draw = random.Random(1)
    base = {i: draw.randint(2, 8) for i in range(60)}
    better = {i: min(10, rating + draw.choice((0, 1, 2))) for i, rating in base.items()}
    noise = {i: rating + draw.choice((-1, 0, 1)) for i, rating in base.items()}
    of = {"base": base, "better": better, "noise": noise}
    found = single(asked(60), [*of], lambda one: f"[[{of[one.models[0]][one.question_id]}]]")
    assert found["differences"]["better"]["all"]["is_shown"]
    assert not found["differences"]["noise"]["all"]["is_shown"]


def test_many_differences_are_corrected_for_their_number():
    draw = random.Random(2)
    labels = ["base", *(f"same {i}" for i in range(20))]
    found = single(asked(30), labels, lambda one: f"[[{draw.randint(3, 8)}]]")
    for parts in (("all", "turn 1", "turn 2"), ("category math", "category writing")):
        family = [of_one[part] for of_one in found["differences"].values() for part in parts]
        least = min(family, key=lambda one: one["p_value"])
        assert least["corrected_p_value"] == min(1, least["p_value"] * len(family))
        assert not any(one["is_shown"] for one in family)


def test_what_was_not_read_is_counted_and_is_in_no_mean():
    def say(request):
        if (request.question_id, request.turn) == (0, 2):
            return "I would rather not say."
        if (request.question_id, request.turn) == (1, 1):
            return None
        return "[[4]]"

    found = single(asked(3), ["base"], say)["models"]["base"]
    assert (found["num_requests"], found["num_unread"], found["num_without_reply"]) == (6, 1, 1)
    assert found["ratings"]["all"]["num_questions"] == 1  # of which both turns were read
    assert found["ratings"]["turn 1"]["num_questions"] == 2
    assert found["ratings"]["all"]["mean"] == 4.0


def test_of_nothing_read_there_is_no_mean():
    found = single(asked(), ["base", "mine"], lambda one: "nonsense")
    assert found["models"]["mine"]["num_unread"] == 4
    for one in (*found["models"]["mine"]["ratings"].values(), found["differences"]["mine"]["all"]):
        assert one["mean"] is None
        assert one["num_questions"] == 0


def test_equal_answers_are_asked_once_and_differ_by_nothing():
    from keylayers.evaluation.judge.requests import unique
    from keylayers.evaluation.judge.results import single_results

    questions = asked(3, 1)
    yes = dict.fromkeys(range(3), ("yes",))
    said = {"base": yes, "same": yes}
    requests = planned(questions, ["base", "same"], said=said)
    once = list(unique(requests))
    assert (len(requests), len(once)) == (6, 1)  # the three questions are the same, too
    replies = replied(once, lambda one: "[[6]]")
    found = single_results(questions, ["base", "same"], requests, replies)
    difference = found["differences"]["same"]["all"]
    assert (difference["mean"], difference["low"], difference["high"]) == (0, 0, 0)
    assert not difference["is_shown"]


def test_other_settings_are_other_requests():
    from keylayers.evaluation.judge.options import EndpointOptions
    from keylayers.evaluation.judge.requests import requests_for

    def key(answer="yes", **more):
        given = {"judge_url": "http://host", "judge_model": "m", **more}
        said = {"base": {0: (answer,)}}
        return requests_for(asked(1, 1), ["base"], said, EndpointOptions(**given))[0].key

    others = [
        {"answer": "no"},
        {"judge_model": "n"},
        {"judge_url": "http://other"},
        {"judge_temperature": 0.5},
        {"judge_max_tokens": 7},
    ]
    assert len({key(), *(key(**one) for one in others)}) == 6
    assert key(judge_retries=9, judge_requests_at_once=1, judge_timeout_seconds=1.0) == key()


OUTCOMES = [  # verdict where the first model is A, where it is B -> win, tie, loss, disagreeing
    ("B", "A", (1, 0, 0, 0)),
    ("A", "B", (0, 0, 1, 0)),
    ("C", "C", (0, 1, 0, 0)),
    ("A", "A", (0, 1, 0, 1)),
    ("B", "B", (0, 1, 0, 1)),
    ("A", "C", (0, 1, 0, 1)),
    ("C", "A", (0, 1, 0, 1)),
]


@pytest.mark.parametrize(("as_a", "as_b", "expected"), OUTCOMES)
def test_a_win_counts_only_in_both_orders(as_a, as_b, expected):
    found = pairwise(
        asked(1, 1),
        ["base", "mine"],
        lambda one: f"[[{as_a if one.models == ('base', 'mine') else as_b}]]",
    )["pairs"]["mine"]
    whole = found["outcomes"]["all"]
    counts = (whole["wins"], whole["ties"], whole["losses"], found["num_disagreeing"])
    assert counts == expected
    assert found["num_first_shown_twice"] == ((as_a, as_b) == ("A", "A"))
    assert found["num_second_shown_twice"] == ((as_a, as_b) == ("B", "B"))


def test_a_judge_that_likes_what_it_sees_first_shows_nothing():
    found = pairwise(asked(40), ["base", "mine"], lambda one: "[[A]]")["pairs"]["mine"]
    assert found["outcomes"]["all"]["ties"] == 80
    assert found["num_first_shown_twice"] == 80
    assert not found["outcomes"]["all"]["gain"]["is_shown"]


def test_a_model_that_wins_mostly_is_shown_to_win():
    def prefer(request):
        winner = "base" if request.question_id % 5 == 0 else "mine"
        return f"[[{'AB'[request.models.index(winner)]}]]"

    found = pairwise(asked(40), ["base", "mine"], prefer)["pairs"]["mine"]
    whole = found["outcomes"]["all"]
    assert (whole["wins"], whole["ties"], whole["losses"]) == (64, 0, 16)
    assert whole["gain"]["mean"] == pytest.approx(0.6)
    assert whole["gain"]["is_shown"]


def test_a_pair_with_one_verdict_missing_is_not_counted():
    def say(request):
        if request.question_id == 0:
            return "nonsense" if request.models[0] == "base" else "[[A]]"
        return None if request.models[0] == "mine" else "[[A]]"

    found = pairwise(asked(2, 1), ["base", "mine"], say)["pairs"]["mine"]
    assert (found["num_comparisons"], found["num_unread"], found["num_without_reply"]) == (2, 1, 1)
    whole = found["outcomes"]["all"]
    assert (whole["wins"], whole["ties"], whole["losses"]) == (0, 0, 0)
    assert whole["gain"]["mean"] is None


def test_the_estimate_is_what_is_still_to_be_asked_at_its_longest():
    from keylayers.evaluation.judge.cost import estimate
    from keylayers.evaluation.judge.options import EndpointOptions
    from keylayers.evaluation.judge.requests import unique

    questions = asked(2, 2)
    said = {"base": {0: ("one", "two"), 1: None}}
    requests = list(unique(planned(questions, ["base"], said=said)))
    options = EndpointOptions(
        judge_url="http://host",
        judge_model="m",
        judge_max_tokens=10,
        judge_price_input=2.0,
        judge_price_output=8.0,
    )
    kept = frozenset([requests[0].key])
    cost = estimate(requests, kept, len, max_new_tokens=1000, options=options)
    assert (cost.num_requests, cost.num_kept, cost.num_to_ask) == (4, 1, 3)
    assert cost.num_missing_answers == 3  # one before the first turn's judgement, two at the second
    assert cost.prompt_tokens == 3000 + sum(len(one.prompt) for one in requests[1:])
    assert cost.completion_tokens == 30
    assert cost.price == pytest.approx((2 * cost.prompt_tokens + 8 * 30) / 1e6)


def test_temperatures_are_those_of_the_categories_unless_one_is_given():
    from keylayers.evaluation.judge.options import AnswerOptions

    options = AnswerOptions(questions="q")
    named = {name: options.temperature_of(name) for name in ("writing", "math", "stem", "fermi")}
    assert named == {"writing": 0.7, "math": 0.0, "stem": 0.1, "fermi": 0.7}
    assert AnswerOptions(questions="q", temperature=0.3).temperature_of("math") == 0.3
