# SPDX-License-Identifier: Apache-2.0
"""Questions, prompts, verdicts and files of lines."""

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

QUESTION = {"question_id": 1, "category": "math", "turns": ["One and one?", "And one more?"]}
REFERENCE = {"question_id": 1, "choices": [{"turns": ["Two.", "Three."]}]}


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(tmp_path, rows, references=None, **more):
    from keylayers.evaluation.judge.options import AnswerOptions
    from keylayers.evaluation.judge.questions import read_questions

    given = {"questions": lines(tmp_path / "q.jsonl", *rows), **more}
    if references is not None:
        given["references"] = lines(tmp_path / "r.jsonl", *references)
    return read_questions(AnswerOptions(**given))


def test_questions_and_references_are_read(tmp_path):
    other = {"question_id": "x", "category": "writing", "turns": ["Write."]}
    asked = read(tmp_path, [QUESTION, other], [REFERENCE])
    assert [one.turns for one in asked.questions] == [
        ("One and one?", "And one more?"),
        ("Write.",),
    ]
    assert [one.references for one in asked.questions] == [("Two.", "Three."), (None,)]
    assert asked.categories == ["math", "writing"]
    assert asked.num_turns == 2
    assert asked.record["num_with_reference"] == 1


def test_a_reference_may_hold_fewer_turns_than_the_question(tmp_path):
    short = {"question_id": 1, "choices": [{"turns": ["Two."]}]}
    assert read(tmp_path, [QUESTION], [short]).questions[0].references == ("Two.", None)


def test_the_first_questions_of_each_category_are_taken(tmp_path):
    rows = [QUESTION | {"question_id": i, "category": "ab"[i % 2]} for i in range(6)]
    asked = read(tmp_path, rows, max_questions=2)
    assert [one.question_id for one in asked.questions] == [0, 1, 2, 3]


def test_mt_bench_and_vicuna_are_read_whole(shared):
    from keylayers.evaluation.judge.options import AnswerOptions
    from keylayers.evaluation.judge.questions import read_questions

    bench = shared / "data" / "bench"
    references = str(bench / "mt_bench_reference_gpt4.jsonl")
    mt_bench = AnswerOptions(
        questions=str(bench / "mt_bench_questions.jsonl"), references=references
    )
    asked = read_questions(mt_bench)
    assert len(asked.questions) == 80
    assert {len(one.turns) for one in asked.questions} == {2}
    with_reference = {one.category for one in asked.questions if one.references[0]}
    assert with_reference == {"math", "reasoning", "coding"}
    assert asked.record["num_with_reference"] == 30
    vicuna = read_questions(AnswerOptions(questions=str(bench / "vicuna_questions.jsonl")))
    assert len(vicuna.questions) == 80
    assert vicuna.num_turns == 1


BAD_QUESTIONS = [
    ("", "must hold a question or more"),
    ("\n\n", "must hold a question or more"),
    ("{", "must be a JSON object, but line 1 is not"),
    ("[" * 100_000, "must be a JSON object, but line 1 is not"),
    ("\xff", "must be a JSON object, but line 1 is not"),
    ("[]", "must be a JSON object, but line 1 is not"),
    ('{"question_id": 1}', "must be a question as FastChat writes it"),
    ('{"question_id": true, "category": "a", "turns": ["b"]}', "but line 1 is not"),
    ('{"question_id": 1, "category": "a", "turns": []}', "but line 1 is not"),
    ('{"question_id": 1, "category": "a", "turns": [" "]}', "but line 1 is not"),
    ('{"question_id": 1, "category": "a", "turns": "b"}', "but line 1 is not"),
    ('{"question_id": 1, "category": "a", "turns": ["\\ud800"]}', "but line 1 is not"),
    ('{"question_id": 1, "category": 3, "turns": ["b"]}', "but line 1 is not"),
    ('{"question_id": 1, "category": "\\u001b[31m", "turns": ["b"]}', "but line 1 is not"),
    ('{"question_id": "\\ud800", "category": "a", "turns": ["b"]}', "but line 1 is not"),
    (f"{json.dumps(QUESTION)}\n{json.dumps(QUESTION)}", "but 1 is there again in line 2"),
]


@pytest.mark.parametrize(("content", "line"), BAD_QUESTIONS, ids=lambda one: repr(one)[:40])
def test_a_file_that_holds_no_questions_is_one_line(tmp_path, content, line):
    from keylayers.errors import DataError
    from keylayers.evaluation.judge.options import AnswerOptions
    from keylayers.evaluation.judge.questions import read_questions

    (tmp_path / "q.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        read_questions(AnswerOptions(questions=str(tmp_path / "q.jsonl")))
    assert line in str(caught.value)


BAD_REFERENCES = [
    {"question_id": 1},
    {"question_id": 1, "choices": []},
    {"question_id": 1, "choices": [{"turns": [3]}]},
    {"choices": [{"turns": ["Two."]}]},
]


@pytest.mark.parametrize("row", BAD_REFERENCES, ids=str)
def test_a_file_that_holds_no_references_is_one_line(tmp_path, row):
    from keylayers.errors import DataError

    with pytest.raises(DataError, match=r"must hold a reference answer .* line 1 does not"):
        read(tmp_path, [QUESTION], [row])


def test_references_to_other_questions_are_refused(tmp_path):
    from keylayers.errors import DataError

    with pytest.raises(DataError, match=r"`references` must hold answers to the questions asked"):
        read(tmp_path, [QUESTION], [REFERENCE | {"question_id": 2}])


MISSING = [
    ("nowhere.jsonl", r"or the name mt-bench, but 'nowhere.jsonl' cannot be read: No such file"),
    ("mtbench", r"cannot be read: No such file or directory, did you mean 'mt-bench'\?"),
    (
        "mt-bench",
        r"must be on the hub, in data/mt_bench/question.jsonl of the space lmsys/mt-bench",
    ),
    ("a\0b", r"cannot be read: embedded null byte"),
]


@pytest.mark.parametrize(("name", "line"), MISSING, ids=repr)
def test_questions_that_are_not_there_are_one_line(tmp_path, monkeypatch, name, line):
    from keylayers.errors import DataError
    from keylayers.evaluation.judge.options import AnswerOptions
    from keylayers.evaluation.judge.questions import read_questions

    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=line):
        read_questions(AnswerOptions(questions=name))


def test_mt_bench_by_its_name_is_the_file_of_its_space(tmp_path, monkeypatch):
    """As the hub's own client lays it out in its cache, which stands for the hub here."""
    from huggingface_hub import constants

    from keylayers.evaluation.judge.options import AnswerOptions
    from keylayers.evaluation.judge.questions import read_questions

    space = tmp_path / "spaces--lmsys--mt-bench"
    file = space / "snapshots" / ("0" * 40) / "data" / "mt_bench" / "question.jsonl"
    file.parent.mkdir(parents=True)
    (space / "refs").mkdir()
    (space / "refs" / "main").write_text("0" * 40)
    lines(file, QUESTION)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    asked = read_questions(AnswerOptions(questions="mt-bench"))
    assert [one.turns for one in asked.questions] == [tuple(QUESTION["turns"])]
    assert asked.record["name"] == "mt-bench"


def said(text, finish_reason="stop"):
    from keylayers.evaluation.judge.client import Reply

    return Reply(text, finish_reason, 1, 1)


RATINGS = [
    ("Good.\nRating: [[7]]", 7.0),
    ("[[7.5]]", 7.5),
    ("[[ 10 ]]", 10.0),
    ("[[7]] as I said: [[7]]", 7.0),
    ("<think>[[3]] or [[4]]</think>Rating: [[8]]", 8.0),
    ("[[3]] or [[4]]</think>Rating: [[8]]", 8.0),
    ("<think>It may be a [[7]], but let me look again at", None),
    ("<think>[[3]]</think>Hm. <think>Rather a [[8]]", None),
    ("Rating: 7", None),
    ("", None),
    ("[[0]]", None),
    ("[[11]]", None),
    ("[[7]] no, [[8]]", None),
    ("[[7/10]]", None),
    ("[[rating]]", None),
    ("[[-7]]", None),
    ("[[7", None),
    ("[[nan]]", None),
    ("[[1e1]]", None),
    ("[[٧]]", None),
    ("[" * 100_000, None),
    ("[[" + "7" * 100_000 + "]]", None),
]


@pytest.mark.parametrize(("reply", "rating"), RATINGS, ids=lambda one: repr(one)[:40])
def test_a_rating_is_read_or_it_is_not_and_never_guessed(reply, rating):
    from keylayers.evaluation.judge.verdicts import read_rating

    assert read_rating(said(reply)) == rating


def test_a_reply_that_was_cut_is_not_read():
    from keylayers.evaluation.judge.verdicts import read_rating, read_verdict

    for text in ("I am to end with a number, such as: Rating: [[5]]", "Let me weigh it. [[7]] or"):
        assert read_rating(said(text)) is not None
        assert read_rating(said(text, "length")) is None
    assert read_verdict(said("[[A]]", "length")) is None


VERDICTS = [
    ("[[A]]", "A"),
    ("B is better. [[B]]", "B"),
    ("[[C]]", "C"),
    ("[[a]]", None),
    ("[[A]] or [[B]]", None),
    ("A", None),
    ("[[D]]", None),
    ("[[7]]", None),
]


@pytest.mark.parametrize(("reply", "verdict"), VERDICTS)
def test_a_verdict_is_read_or_it_is_not(reply, verdict):
    from keylayers.evaluation.judge.verdicts import read_verdict

    assert read_verdict(said(reply)) == verdict


def question(references=("Two.", "Three.")):
    from keylayers.evaluation.judge.questions import Question

    return Question(1, "math", ("One and one?", "And one more?"), references)


def test_the_first_turn_is_rated_without_the_second():
    from keylayers.evaluation.judge.prompts import rating_prompt

    prompt = rating_prompt(question(), ["It is 2."])
    for part in ("<user 1>\nOne and one?\n", "<assistant 1>\nIt is 2.\n", "[[5]]"):
        assert part in prompt
    assert "<reference answer 1>\nTwo.\n" in prompt
    assert "more" not in prompt.partition("<")[2]
    assert "Three" not in prompt


def test_the_second_turn_is_rated_with_the_first_in_sight():
    from keylayers.evaluation.judge.prompts import rating_prompt

    prompt = rating_prompt(question(), ["It is 2.", "It is 3."])
    order = [
        prompt.index(part)
        for part in (
            "<reference answer 1>\nTwo.\n",
            "<reference answer 2>\nThree.\n",
            "<user 1>",
            "<assistant 1>",
            "<user 2>",
            "<assistant 2>\nIt is 3.\n",
        )
    ]
    assert order == sorted(order)
    assert "answer number 2" in prompt


def test_without_a_reference_there_is_no_word_of_one():
    from keylayers.evaluation.judge.prompts import comparison_prompt, rating_prompt

    for prompt in (
        rating_prompt(question((None, None)), ["It is 2."]),
        rating_prompt(question(("Two.", None)), ["It is 2.", "It is 3."]),
        comparison_prompt(question((None, None)), ["It is 2."], ["It is 4."]),
    ):
        assert "reference" not in prompt


def test_two_answers_are_compared_in_the_order_given():
    from keylayers.evaluation.judge.prompts import comparison_prompt

    prompt = comparison_prompt(question(), ["It is 2."], ["It is 4."])
    assert prompt.index("<assistant A 1>\nIt is 2.\n") < prompt.index("<assistant B 1>\nIt is 4.\n")
    assert all(f"[[{verdict}]]" in prompt for verdict in "ABC")
    swapped = comparison_prompt(question(), ["It is 4."], ["It is 2."])
    assert "<assistant A 1>\nIt is 4.\n" in swapped
    assert "<assistant B 1>\nIt is 2.\n" in swapped


def test_lines_are_whole_whatever_was_there_before(tmp_path):
    from keylayers.evaluation.judge.lines import LineFile, read_lines

    path = tmp_path / "deep" / "lines.jsonl"
    with LineFile(path) as file:
        file.add({"text": "a\u2028b\nc", "number": 1})
    path.write_bytes(path.read_bytes() + b'{"broken\n[1]\n\xff\n{"text": "half a li')
    rows, num_damaged = read_lines(path)
    assert rows == [{"text": "a\u2028b\nc", "number": 1}]
    assert num_damaged == 3
    with LineFile(path) as file:
        file.add({"text": "last"})
    assert read_lines(path) == ([*rows, {"text": "last"}], 3)
    assert b"half a li" not in path.read_bytes()


ANSWER = {
    "key": "k",
    "model_sha256": "m",
    "question_id": 1,
    "turns": ["a"],
    "endings": ["stop"],
    "num_tokens": [1],
}
REPLY = {
    "key": "k",
    "text": "[[7]]",
    "finish_reason": "stop",
    "prompt_tokens": 1,
    "completion_tokens": None,
}
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)


@pytest.mark.parametrize("row", [ANSWER, REPLY], ids=["answers", "replies"])
@given(data=st.data())
def test_damaged_files_of_answers_and_replies_are_counted(tmp_path_factory, row, data):
    from keylayers.evaluation.judge.answers import kept_answers
    from keylayers.evaluation.judge.asking import kept_replies

    changed = data.draw(st.sampled_from(sorted(row)))
    path = tmp_path_factory.mktemp("damaged") / "file.jsonl"
    lines(path, row | {changed: data.draw(values)})
    found, num_damaged = kept_answers(path, "m") if row is ANSWER else kept_replies(path)
    assert len(found) + num_damaged <= 1
    for one in found.values():
        assert json.dumps(asdict(one), ensure_ascii=False).encode()
    lines(path, row)
    found, num_damaged = kept_answers(path, "m") if row is ANSWER else kept_replies(path)
    assert (len(found), num_damaged) == (1, 0)


def test_a_long_line_that_was_not_finished_is_cut_off(tmp_path):
    from keylayers.evaluation.judge.lines import LineFile

    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b"x" * 200_000)
    with LineFile(path):
        pass
    assert path.read_bytes() == b'{"a": 1}\n'
    path.write_bytes(b"x" * 200_000)
    with LineFile(path):
        pass
    assert path.read_bytes() == b""


def test_a_full_disk_is_one_line_and_leaves_whole_lines(tmp_path, monkeypatch):
    import errno
    import os

    from keylayers.errors import OutputError
    from keylayers.evaluation.judge.lines import LineFile, read_lines

    path = tmp_path / "lines.jsonl"
    real = os.pwrite

    def fills_up(file, content, place):
        if place > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, content[:8], place)

    with LineFile(path) as file:
        file.add({"a": 1})
        monkeypatch.setattr(os, "pwrite", fills_up)
        with pytest.raises(OutputError, match="No space left on device"):
            file.add({"a": "x" * 100})
        monkeypatch.undo()
        file.add({"a": 2})
    assert read_lines(path) == ([{"a": 1}, {"a": 2}], 0)


def test_a_file_that_is_closed_takes_nothing(tmp_path):
    from keylayers.errors import OutputError
    from keylayers.evaluation.judge.lines import LineFile

    with LineFile(tmp_path / "lines.jsonl") as file:
        pass
    with pytest.raises(OutputError, match="must be open"):
        file.add({})
