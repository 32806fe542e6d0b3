# SPDX-License-Identifier: Apache-2.0
"""Problems: read, answered, checked, counted."""

import json
import threading
from itertools import combinations

import pytest


def write_problems(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(("num", "right"), [(5, 0), (5, 2), (6, 6), (4, 1)])
def test_pass_at_k_is_the_share_of_sets_with_a_right_answer(num, right):
    from keylayers.evaluation.pass_at_k import pass_at_k

    answers = [True] * right + [False] * (num - right)
    for k in range(1, num + 1):
        sets = list(combinations(answers, k))
        assert pass_at_k(num, right, k) == pytest.approx(sum(map(any, sets)) / len(sets))


def test_the_majority_is_worked_out_by_hand():
    from keylayers.evaluation.pass_at_k import majority_at_k

    assert majority_at_k([0, 0, 1], 3, "") == 1.0
    assert majority_at_k([0, 1, 2], 3, "") == pytest.approx(1 / 3)  # each wins as often
    assert majority_at_k([0, None, None], 3, "") == 1.0  # who gives no answer does not vote
    assert majority_at_k([None, None], 2, "") == 0.0
    # of the sets of two: (right, right), and twice (right, wrong), which is a toss
    assert majority_at_k([0, 0, 1], 2, "") == pytest.approx((1 + 0.5 + 0.5) / 3)


def test_a_majority_over_drawn_sets_is_close_to_that_over_all():
    from keylayers.evaluation.pass_at_k import majority_at_k

    found = [0] * 7 + [1] * 5 + [2] * 3 + [None]
    drawn = majority_at_k(found, 8, "seed")
    every = [tuple(found[index] for index in one) for one in combinations(range(16), 8)]
    shares = []
    for one in every:
        counts = [one.count(answer) for answer in (0, 1, 2)]
        best = max(counts)
        shares.append((counts[0] == best) / counts.count(best) if best else 0.0)
    assert drawn == pytest.approx(sum(shares) / len(shares), abs=0.05)
    assert drawn == majority_at_k(found, 8, "seed")


def test_k_doubles_up_to_the_number_of_samples():
    from keylayers.evaluation.pass_at_k import counts_up_to

    assert counts_up_to(1) == [1]
    assert counts_up_to(8) == [1, 2, 4, 8]
    assert counts_up_to(6) == [1, 2, 4, 6]


ANSWERED = [
    ("so it is \\boxed{4}", "4", True),
    ("The answer is 4.", "4", True),
    ("\\boxed{0.5}", "\\frac{1}{2}", True),
    ("\\boxed{7 \\frac{3}{11}}", "80/11", True),
    ("\\boxed{5}, no, \\boxed{4}", "4", True),  # the last box counts
    ("\\boxed{5}", "4", False),
    ("\\boxed{3568, 5880}", "5880, 3568", True),
    ("\\boxed{x = 4}", "4", True),
    ("\\boxed{evil}", "live", False),  # math-verify has the product of the same letters
    ("\\boxed{Live}", "live", True),
    ("\\boxed{New  York}", "\\text{New York}", True),
    ("\\boxed{\\text{York New}}", "New York", False),
    ("$\\boxed{\\textbf{Paris.}}$", "Paris", True),
    ("The answer is Paris.", "Paris", True),
    ("So the answer is: **Rome**", "Paris", False),
    ("The answer is (B).", "B", True),
    ("The answer is C, not (B).", "B", False),
    ("\\boxed{(B)}", "B", True),
    ("\\boxed{yx}", "\\frac{xy}{1}", True),
]


@pytest.mark.parametrize(("text", "wanted", "is_right"), ANSWERED)
def test_answers_are_found_and_compared(text, wanted, is_right):
    from keylayers.evaluation.answers import verdict

    found = verdict(text, f"\\boxed{{{wanted}}}")
    assert found.answer is not None
    assert found.is_right == is_right


@pytest.mark.parametrize("text", ["", "I think of 4 apples and 17 pears", "4", "So \\boxed{}"])
def test_what_is_no_answer_is_never_taken_for_one(text):
    from keylayers.evaluation.answers import Verdict, verdict

    assert verdict(text, "\\boxed{4}") == Verdict(None, is_right=False)
    assert verdict(text, "\\boxed{Paris}") == Verdict(None, is_right=False)


def test_words_are_an_answer_only_where_words_are_wanted():
    from keylayers.evaluation.answers import verdict

    assert verdict("I was in Paris.", "\\boxed{Paris}").answer is None
    assert verdict("The answer is not clear.", "\\boxed{4}").answer is None
    assert verdict("The answer is not clear.", "\\boxed{Paris}").answer == "not clear"


def test_equal_answers_are_one_vote():
    from keylayers.evaluation.answers import are_same
    from keylayers.evaluation.pass_at_k import votes

    answers = ["4", "0.5", "\\frac{1}{2}", None, "7"]
    assert votes(answers, [True, False, False, False, False], are_same) == [0, 1, 1, None, 2]
    words = ["live", "evil", "\\text{Live}", "(B)", "B"]
    assert votes(words, [True, False, True, False, False], are_same) == [0, 1, 0, 2, 2]


def test_a_checker_outside_the_main_thread_is_refused():
    from keylayers.errors import ConfigError
    from keylayers.evaluation.answers import check_thread

    caught = []

    def check():
        try:
            check_thread()
        except ConfigError as error:
            caught.append(str(error))

    thread = threading.Thread(target=check)
    thread.start()
    thread.join()
    assert "main thread" in caught[0]


def test_problems_come_in_several_fields_and_answers_in_several_forms(tmp_path):
    from keylayers.evaluation.problems import load_problems

    rows = [
        {"Question": "a?", "Answer": "way #### 1,234"},
        {"problem": "b?", "answer": [1, 2.5], "url": "x"},
        {"problem": "c?", "answer": "$\\frac{1}{2}$."},
        {"problem": "d?", "answer": {"x": 1}},
        {"problem": "c?", "answer": "$\\frac{1}{2}$."},
        {"problem": "e?", "solution": "so \\boxed{3}"},
        {"problem": "f?", "answer": None},
    ]
    found = load_problems(str(write_problems(tmp_path / "mine.jsonl", rows)), "test", None)
    assert [(one.text, one.answer) for one in found.problems] == [
        ("a?", "\\boxed{1,234}"),
        ("b?", "\\boxed{1, 2.5}"),
        ("c?", "\\boxed{\\frac{1}{2}}"),
        ("e?", "so \\boxed{3}"),
    ]
    assert found.note == (
        "mine: 4 problems; of all in the set, left out are 2 with an answer of no known form, or "
        "none and 1 that are there twice"
    )
    assert len(load_problems(str(tmp_path / "mine.jsonl"), "test", 2).problems) == 2


def test_problems_in_a_table_are_read_too(tmp_path):
    from keylayers.evaluation.problems import load_problems

    (tmp_path / "set.csv").write_text("question,answer\nWhat is 1 + 1?,2\n")
    (one,) = load_problems(str(tmp_path / "set.csv"), "test", None).problems
    assert one.answer == "\\boxed{2}"


BAD = [
    ("nothing-here", "must be gsm8k, math-500, aime, a file, or owner/name"),
    ("gsm8", "did you mean 'gsm8k'"),
    ("rows.jsonl:no json", "line 1 is not"),
    ("rows.jsonl:[1]", "line 1 is a list"),
    ('rows.jsonl:{"text": "a"}', "row 1 of .* has text"),
    ('rows.jsonl:{"problem": "a", "answer": {}}', "must hold problems with answers, got none"),
]


@pytest.mark.parametrize(("source", "message"), BAD)
def test_what_are_no_problems_is_one_line(source, message, tmp_path):
    from keylayers.errors import DataError
    from keylayers.evaluation.problems import load_problems

    name, _, content = source.partition(":")
    if content:
        (tmp_path / name).write_text(content + "\n")
        name = str(tmp_path / name)
    with pytest.raises(DataError, match=message):
        load_problems(name, "test", None)


def test_every_answer_of_the_real_sets_can_be_read(shared):
    from keylayers.evaluation.answers import check_answer
    from keylayers.evaluation.problems import load_problems

    for name, num in (("gsm", 209), ("math500", 500), ("aime", 30)):
        found = load_problems(str(shared / "data" / "bench" / f"{name}.jsonl"), "test", None)
        assert len(found.problems) == num
        for one in found.problems[:: max(1, num // 30)]:
            check_answer(one.answer)


def test_what_samples_are_worth_is_worked_out_by_hand():
    from keylayers.evaluation.answers import are_same
    from keylayers.evaluation.problems import Problem
    from keylayers.evaluation.sampling import Sample
    from keylayers.evaluation.solved import solved

    problems = [Problem("a", "\\boxed{1}"), Problem("b", "\\boxed{2}")]
    answers = {"a": ["1", "1", "7", None], "b": ["3", "3.0", "2", "5"]}
    samples = {
        (one.sha256(), number): Sample(
            one.sha256(),
            number,
            "",
            num_tokens=10,
            is_cut=answer is None,
            answer=answer,
            is_right=answer == one.answer[7:-1],
            is_out_of_time=False,
        )
        for one in problems
        for number, answer in enumerate(answers[one.text])
    }
    found = solved("set", problems, samples, 4, are_same)
    assert found.totals == pytest.approx(
        {
            "pass@1": (2 / 4 + 1 / 4) / 2,
            "pass@2": ((1 - 1 / 6) + (1 - 3 / 6)) / 2,
            "pass@4": 1.0,
            "majority@4": (1 + 0) / 2,  # 3 and 3.0 are one answer, and win over 2
        }
    )
    assert found.facts["num_unanswered"] == found.facts["num_cut"] == 1
    first = solved("set", problems, samples, 1, are_same)  # the first sample of each alone
    assert first.totals == {"pass@1": 0.5}
    assert sorted(first.rows["value"]) == [0.0, 1.0]
