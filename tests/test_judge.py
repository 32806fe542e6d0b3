# SPDX-License-Identifier: Apache-2.0
"""`keylayers judge` with tiny models and a scripted judge: from options to files and tables."""

import io
import json
import re
import shutil

import pytest
from pytest_socket import enable_socket

from commands import complaint, everything_below, keylayers
from scripted_judge import endpoint

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])

KEY = "sk-" + "kEyLaYeRs" * 4
ROWS = [
    {"question_id": i, "category": category, "turns": ["What does the fox eat?", "And the owl?"]}
    for i, category in enumerate(("math", "writing", "math", "writing"))
] + [{"question_id": "last", "category": "writing", "turns": ["Food of the hen?"]}]
NUM_TURNS = 9


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Questions with reference answers to one of them."""
    folder = tmp_path_factory.mktemp("bench")
    rows = [row | {"turns": [f"{turn} {i}" for turn in row["turns"]]} for i, row in enumerate(ROWS)]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reference = {"question_id": 0, "choices": [{"turns": ["Eggs.", "Mice."]}]}
    (folder / "r.jsonl").write_text(json.dumps(reference) + "\n")
    return folder


@pytest.fixture(autouse=True)
def planted(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def arguments(tiny, bench, script, output, *more):
    return (
        *("judge", "--model", tiny / "model", "--questions", bench / "q.jsonl"),
        *("--judge-url", script.address, "--judge-model", "the judge", "--output", output),
        *("--max-new-tokens", 5, "--answer-batch-size", 2, "--judge-retries", 0),
        *("--judge-requests-at-once", 1, *more),
    )


def judge(*given):
    return keylayers(*arguments(*given))


def record(output):
    return json.loads((output / "judgement.json").read_text())


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def others(tiny, tmp_path_factory):
    """Flags for an adapter, and a checkpoint with its tokenizer."""
    from tiny_files import tiny_tokenizer

    folder = tmp_path_factory.mktemp("others") / "tuned"
    shutil.copytree(tiny / "tuned", folder)
    tiny_tokenizer().save_pretrained(folder)
    return ("--adapter", tiny / "adapter", "--checkpoint", folder)


@pytest.fixture(scope="module")
def judged(tiny, bench, others, tmp_path_factory):
    """A base, an adapter and a checkpoint, rated; the folder and what the judge was asked."""
    output = tmp_path_factory.mktemp("judged") / "out"
    references = ("--references", bench / "r.jsonl")
    enable_socket()  # the marker of the tests reaches no fixture of their module
    with endpoint(("rate",)) as script:
        assert judge(tiny, bench, script, output, *others, *references) == 0
    return output, script


def test_every_turn_of_every_model_is_rated_once(judged):
    output, script = judged
    found = record(output)
    prompts = [one["messages"][0]["content"] for one in script.asked]
    assert len(prompts) == len(set(prompts)) == found["judge"]["num_requests"]
    assert [one["label"] for one in found["models"]] == ["base model", "adapter", "tuned"]
    for one in found["models"]:
        assert one["num_answers"] == NUM_TURNS
        assert found["results"]["models"][one["label"]]["num_requests"] == NUM_TURNS
    assert found["judge"]["num_new_replies"] == len(rows(output / "judgements" / "single.jsonl"))
    assert found["judge"]["prompt_tokens"] == 100 * found["judge"]["num_replies"]
    assert found["judge"]["num_unread"] == 0
    with_reference = [one for one in prompts if "<reference answer 1>\nEggs.\n" in one]
    assert with_reference == [one for one in prompts if "the fox eat? 0" in one]
    assert with_reference


def test_answers_are_those_of_plain_transformers(tiny, judged):
    """The greedy ones, each alone, with nothing of keylayers: of base, adapter and checkpoint."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def load(name):
        return AutoModelForCausalLM.from_pretrained(tiny / name, dtype="float32")

    output, _ = judged
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    models = {
        "base": load("model"),
        "checkpoint": load("tuned"),
        "adapter": PeftModel.from_pretrained(load("model"), tiny / "adapter"),
    }
    question = ["What does the fox eat? 0", "And the owl? 0"]
    said = {}
    for kind, model in models.items():
        (path,) = (output / "answers").glob(f"{kind}-*.jsonl")
        answer = next(row for row in rows(path) if row["question_id"] == 0)
        messages = []
        for turn in question:
            messages.append({"role": "user", "content": turn})
            ids = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt"
            )["input_ids"]
            more = min(5, 64 - ids.shape[1])
            new = model.generate(ids, max_new_tokens=more, do_sample=False)[0, ids.shape[1] :]
            text = tokenizer.decode(new, skip_special_tokens=True).strip()
            messages.append({"role": "assistant", "content": text})
        assert answer["turns"] == [messages[1]["content"], messages[3]["content"]]
        said[kind] = answer["turns"]
    assert len({str(one) for one in said.values()}) == 3


def test_the_same_command_asks_nothing_and_says_the_same(
    tiny, bench, others, judged, tmp_path, capsys
):
    """No model is loaded for it either: its weights are only hashed."""
    output, _ = judged
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    references = ("--references", bench / "r.jsonl")
    with endpoint(("rate",)) as script:
        script.address = record(output)["judge"]["url"]  # the endpoint of before, which is gone
        assert judge(tiny, bench, script, copy, *others, *references) == 0
    assert script.asked == []
    noted = capsys.readouterr().err
    num_replies = record(output)["judge"]["num_replies"]
    assert f"all {num_replies} replies of the judge are there already" in noted
    assert "answers of" not in noted
    first, again = record(output), record(copy)
    for one in (first, again):
        del one["judge"]["num_new_replies"], one["options"]["judge_url"]
    assert again == first


def test_a_broken_run_goes_on_with_the_answers_it_would_have_given(tiny, bench, judged, tmp_path):
    output, _ = judged
    (whole,) = (output / "answers").glob("base-*.jsonl")
    copy = tmp_path / "copy" / "answers" / whole.name
    copy.parent.mkdir(parents=True)
    copy.write_text(whole.read_text()[: -len(whole.read_text()) // 2])
    with endpoint(("rate",)) as script:
        assert judge(tiny, bench, script, tmp_path / "copy") == 0
    by_question = {row["question_id"]: row for row in rows(whole)}
    assert {row["question_id"]: row for row in rows(copy)} == by_question


def test_the_report_shows_means_intervals_and_differences(judged):
    from rich.console import Console

    from keylayers.report.judge import judgement_report

    found = record(judged[0])
    console = Console(width=120, file=io.StringIO())
    console.print(judgement_report(found))
    shown = console.file.getvalue()
    for label in ("base model", "adapter", "tuned"):
        one = found["results"]["models"][label]["ratings"]["all"]
        assert f"{one['mean']:.2f} [{one['low']:.2f}, {one['high']:.2f}]" in shown
    assert "Difference to base model, on the questions that both have" in shown
    assert "no difference shown" in shown
    assert "0 of 9" in shown
    assert "…" not in shown


def test_pairs_are_compared_in_both_orders(tiny, bench, tmp_path, capsys):
    """By a judge that likes what it sees first; where both say the same it is asked once."""
    more = ("--adapter", tiny / "adapter", "--mode", "pairwise", "--max-questions", 1)
    with endpoint(("text", "[[A]]")) as script:
        assert judge(tiny, bench, script, tmp_path, *more) == 0
    found = record(tmp_path)
    base, adapter = (rows(path) for path in sorted((tmp_path / "answers").iterdir(), reverse=True))
    num_same = sum(
        one["turns"][:turn] == other["turns"][:turn]
        for one, other in zip(base, adapter, strict=True)
        for turn in (1, 2)
    )
    assert num_same < 4
    assert len(script.asked) == 8 - num_same  # two questions of two turns in two orders
    pair = found["results"]["pairs"]["adapter"]
    assert pair["outcomes"]["all"]["ties"] == pair["num_disagreeing"] == 4
    shown = capsys.readouterr().out
    assert "compared   disagree  first shown won both  second shown won both" in shown
    assert re.search(r"adapter +4 of 4  4 \(100 %\) +4 +0\n", shown)
    assert "Beside base model: wins and losses are those in both orders; a tie is half" in shown
    assert "…" not in shown


def test_replies_that_cannot_be_read_are_counted_and_shown(tiny, bench, tmp_path, capsys):
    with endpoint(("text", "[bold]I like it\x1b[31m"), ("cut", "Rating: [[")) as script:
        assert judge(tiny, bench, script, tmp_path, "--max-questions", 1) == 0
    shown = capsys.readouterr().out
    assert "4 of 4 replies hold no rating that can be read, and are in no mean" in shown
    assert r"'[bold]I like it\x1b[31m'" in shown  # nothing in it reaches the terminal as it is
    assert "\x1b[31m" not in shown
    assert "3 replies were cut at 2,048 tokens" in shown
    assert "and none of those is read" in shown
    assert "nothing can be said of these models" in shown
    found = record(tmp_path)
    assert found["results"]["models"]["base model"]["ratings"]["all"]["mean"] is None
    assert found["judge"]["num_unread"] == 4


def test_requests_without_reply_are_shown_and_asked_again(tiny, bench, tmp_path, capsys):
    steps = (("rate",), ("status", 400, "too long"), ("rate",))
    with endpoint(*steps) as script:
        assert judge(tiny, bench, script, tmp_path, "--max-questions", 1) == 2
        printed = capsys.readouterr()
        assert "1 of 4 requests got no reply: HTTP 400: 'too long'" in printed.out
        assert printed.err.splitlines()[-1].startswith("keylayers: the judge must reply to every")
        assert judge(tiny, bench, script, tmp_path, "--max-questions", 1) == 0
    assert len(script.asked) == 5
    assert record(tmp_path)["results"]["models"]["base model"]["num_without_reply"] == 0


def test_a_rating_in_a_reply_that_was_cut_is_in_no_count(tiny, bench, tmp_path):
    with endpoint(("cut", "[[9]]"), ("text", "<think>A [[7]]? But"), ("text", "[[4]]")) as script:
        assert judge(tiny, bench, script, tmp_path, "--max-questions", 1) == 0
    found = record(tmp_path)
    of_base = found["results"]["models"]["base model"]
    assert found["judge"]["num_unread"] == of_base["num_unread"] == 2
    assert (found["judge"]["num_cut"], of_base["num_requests"]) == (1, 4)
    assert of_base["ratings"]["all"]["mean"] == 4.0


def test_two_questions_with_the_same_turns_keep_an_answer_each(tiny, tmp_path):
    same = [{"question_id": i, "category": "writing", "turns": ["What?"]} for i in (1, 2)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in same))
    with endpoint(("rate",)) as script:
        assert judge(tiny, tmp_path, script, tmp_path / "out") == 0
        first = record(tmp_path / "out")
        assert judge(tiny, tmp_path, script, tmp_path / "out") == 0
    (answers,) = (tmp_path / "out" / "answers").iterdir()
    assert len({str(row["turns"]) for row in rows(answers)}) == 2  # or this would test nothing
    assert len(script.asked) == first["judge"]["num_requests"] == 2
    assert record(tmp_path / "out")["results"] == first["results"]


def test_a_judge_that_is_not_there_leaves_the_answers(tiny, bench, tmp_path, capsys):
    with endpoint(("rate",)) as script:
        pass
    assert judge(tiny, bench, script, tmp_path / "out", "--max-questions", 1) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any("cannot be reached yet" in line and "answer first" in line for line in lines)
    assert lines[-1].startswith(f"keylayers: the judge at {script.address}/v1 must answer chats, ")
    (answers,) = (tmp_path / "out" / "answers").iterdir()
    assert len(rows(answers)) == 2
    assert not (tmp_path / "out" / "judgement.json").exists()


def test_a_dry_run_says_what_it_would_cost_and_does_nothing(tiny, bench, judged, capsys, tmp_path):
    prices = ("--judge-price-input", 1000, "--judge-price-output", 1000)
    with endpoint(("rate",)) as script:
        more = ("--dry-run", *prices, "--adapter", tiny / "adapter")
        assert judge(tiny, bench, script, tmp_path / "new", *more) == 0
        fresh = capsys.readouterr().out
        assert judge(tiny, bench, script, judged[0], "--dry-run") == 0
        known = capsys.readouterr().out
    assert script.asked == []
    assert not (tmp_path / "new").exists()
    for line in (
        "models            base model, adapter",
        "questions         5: math 2, writing 3",
        "answers           18 turns to give, 0 are there",
        "requests          18 to the judge, 0 replies are there",
        f"reply tokens      {18 * 2048:,} at most",
    ):
        assert line in fresh
    assert "answers           0 turns to give, 9 are there" in known
    assert "price             not known without prices" in known


def test_no_key_is_in_anything_that_is_written_or_printed(tiny, bench, tmp_path, capfd):
    """Even if the judge says it back, in a reply or in an error."""
    steps = (("text", "Your key is KEY [[5]]"), ("status", 400, "bad key KEY"), ("rate",))
    with endpoint(*steps, ("status", 402, "no money on KEY")) as script:
        assert judge(tiny, bench, script, tmp_path / "a", "--max-questions", 1) == 2
        more = ("--mode", "pairwise", "--adapter", tiny / "adapter")
        assert judge(tiny, bench, script, tmp_path / "a", *more) == 2
    with endpoint(("text", "KEY"), ("page",)) as script:
        assert judge(tiny, bench, script, tmp_path / "b") == 2
    assert {one["key"] for one in script.asked} == {KEY}
    written = everything_below(tmp_path)
    assert len(written) >= 6
    assert [path for path, content in written.items() if KEY.encode() in content] == []
    printed = "".join(capfd.readouterr())
    assert "[key]" in printed
    assert KEY not in printed


def test_a_model_without_room_answers_nothing_and_it_is_said(tiny, bench, tmp_path, capsys):
    long = {"question_id": 1, "category": "a", "turns": ["fox " * 100, "And then?"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(long) + "\n")
    with endpoint(("rate",)) as script:
        assert judge(tiny, tmp_path, script, tmp_path / "out") == 0
    (path,) = (tmp_path / "out" / "answers").iterdir()
    assert rows(path)[0]["endings"] == ["no room", "no room"]
    assert "2 of 2 answers are empty" in capsys.readouterr().out


REFUSED = [
    (("--no-base",), "there must be a model to judge"),
    (("--mode", "pairwise"), "`mode` pairwise must have two models or more"),
    (("--adapter", "nowhere/at/all"), "'nowhere/at/all' must be a PEFT adapter"),
    (("--model", "nowhere/at/all"), "'nowhere/at/all' must be a model"),
    (("--questions", "nowhere.jsonl"), "`questions` must be a file of JSON lines"),
    (("--chat-template", "nowhere.jinja"), "`chat_template` must be alpaca, chatml or a readable"),
    (("--temperature", "-1"), "`temperature` must be 0 or more"),
    (("--judge-key-variable", "NOT_SET"), "NOT_SET is not set"),
    (("--judge-url", "nonsense"), "`judge_url` must be an address"),
]


@pytest.mark.parametrize(("more", "line"), REFUSED, ids=str)
def test_bad_input_is_one_line_and_leaves_nothing(tiny, bench, tmp_path, capsys, more, line):
    given = [str(one) for one in more]
    with endpoint(("rate",)) as script:
        words = [str(one) for one in arguments(tiny, bench, script, tmp_path / "out")]
    if given[0] in words:
        place = words.index(given[0])
        words[place : place + 2] = []
    assert keylayers(*words, *given) == 2
    assert line in complaint(capsys)
    assert not (tmp_path / "out").exists()


def test_the_same_adapter_twice_is_refused(tiny, bench, tmp_path, capsys):
    adapters = ("--adapter", tiny / "adapter", tiny / "adapter")
    with endpoint(("rate",)) as script:
        assert judge(tiny, bench, script, tmp_path / "out", *adapters) == 2
    assert "every model must be given once, got" in complaint(capsys)


def test_without_openai_the_extra_is_named(tiny, bench, tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "openai", None)
    with endpoint(("rate",)) as script:
        assert judge(tiny, bench, script, tmp_path / "out") == 2
    assert "pip install 'keylayers[judge]'" in complaint(capsys)


def test_options_come_from_a_file_too(tiny, bench, tmp_path):
    with endpoint(("rate",)) as script:
        (tmp_path / "judge.yaml").write_text(
            f"model: {tiny / 'model'}\nquestions: {bench / 'q.jsonl'}\njudge_model: m\n"
            f"judge_url: {script.address}\nmax_questions: 1\nmax_new_tokens: 2\n"
            f"judge_temperature: 0.5\n"
        )
        output = ("--output", tmp_path / "out")
        assert keylayers("judge", "--config", tmp_path / "judge.yaml", *output) == 0
    assert script.asked[0]["temperature"] == 0.5
    assert record(tmp_path / "out")["options"]["max_new_tokens"] == 2
