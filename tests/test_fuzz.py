# SPDX-License-Identifier: Apache-2.0
"""Generated damage to the files that commands read: one line and exit code 2, or a right result."""

import gc
import io
import json
import math
import shutil
import warnings

import pandas
import pytest
from hypothesis import strategies as st

from damage import LARGE, begin, changed, damaged_bytes, damaged_json, damaged_yaml, fuzz, run
from keylayers.data.options import DataOptions
from keylayers.data.reading import read_conversations
from keylayers.errors import DataError, ModelError
from keylayers.model.loading import load_adapter, load_model
from keylayers.model.options import ModelOptions
from keylayers.ranking.ranking import Ranking
from keylayers.updates import adapter_updates
from test_spectrum_file import scan_of

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings(LARGE)]


def check_ranking(path):
    """What was accepted is a ranking: finite scores, in order, the same after a round trip."""
    ranking = Ranking.load(path)
    scores = [module.score for module in ranking.ordered()]
    known = [score for score in scores if score is not None]
    assert all(math.isfinite(score) for score in known)
    assert known == sorted(known, reverse=True)
    assert scores[len(known) :] == [None] * (len(scores) - len(known))
    assert Ranking.from_json(json.loads(json.dumps(ranking.to_json())), "again") == ranking


@pytest.fixture
def folder(ranking_copy, monkeypatch):
    """The working directory, with a sound ranking and its verification."""
    monkeypatch.chdir(ranking_copy)
    begin("verify", "--ranking", ".", "--points", "3", "--random-orders", "1")
    return ranking_copy


# What is damaged -> commands that read it; the first is fast
READ_BY = {
    "ranking.json": [
        "show ranking.json --json",
        "show ranking.json",
        "show ranking.json --budget 0.5x-params",
        "compare ranking.json good.json --budget 2",
        "compare good.json ranking.json --json --consensus new/consensus.json",
        "export ranking.json --budget 2 --to peft --output new/out",
        "export ranking.json --budget 0.6x-time --to axolotl --output new/out",
        "show ranking.json --figure new/heatmap.svg new/losses.svg",
        "show ranking.json good.json --html new/report.html",
    ],
    "verification.json": [
        "export ranking.json --budget auto --to trl --output new/out",
        "show ranking.json --figure new/curve.svg",
    ],
}


@pytest.mark.parametrize("name", READ_BY)
def test_a_damaged_record_is_refused_by_every_command_or_right(name, folder):
    path, (first, *others) = folder / name, READ_BY[name]
    whole = json.loads(path.read_text())
    shutil.copy("ranking.json", "good.json")
    for command in READ_BY[name]:
        begin(*command.split())

    def check(given):
        content, other = given
        shutil.rmtree("new", ignore_errors=True)
        path.write_bytes(content)
        if run(*first.split()) == 2:
            assert run(*other.split()) == 2
            return
        if name == "ranking.json":
            check_ranking(path)
        for command in others:
            run(*command.split())

    fuzz(check, st.tuples(damaged_json(whole), st.sampled_from(others)), 500)


READERS = ["show {}", "show {} --html r.html", "export {} --budget 1 --to peft"]


@pytest.mark.parametrize("words", READERS)
def test_links_in_a_circle_are_refused(words, tmp_path):
    for name, target in (("a.json", "b.json"), ("b.json", "a.json"), ("dir", "dir")):
        (tmp_path / name).symlink_to(tmp_path / target)
    for name in ("a.json", "dir"):
        assert run(*words.format(tmp_path / name).split()) == 2


OPTIONS = {
    "model": "nowhere", "data": "nowhere.jsonl", "max_steps": 3, "epsilon": 0.1, "held_out": 0.2,
    "load_in_4bit": False, "method": "path", "report_to": ["tensorboard"], "seed": 1,
}  # fmt: skip


def test_a_damaged_yaml_file_is_one_line(tmp_path, monkeypatch):
    """No model is there, so that even a sound file ends in a line."""
    monkeypatch.chdir(tmp_path)
    begin("rank", "--model", "nowhere", "--data", "nowhere.jsonl")

    def check(given):
        command, content = given
        (tmp_path / "run.yaml").write_bytes(content)
        assert run(command, "--config", "run.yaml", "--output", "out") == 2
        assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]

    fuzz(check, st.tuples(st.sampled_from(["rank", "train"]), damaged_yaml(OPTIONS)), 800)


def turns(role, content, *roles):
    return [{role: name, content: name} for name in roles]


SOUND = st.sampled_from(
    [
        [{"prompt": "Why?", "completion": "Because."}] * 4,
        [{"messages": turns("role", "content", "user", "assistant")}] * 3,
        [{"instruction": "Do.", "input": "", "output": "Done."}] * 3,
        [{"conversations": turns("from", "value", "human", "gpt")}] * 3,
    ]
)


def lines(rows):
    rows = rows if isinstance(rows, list) else [rows]
    return "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def table(write, rows):
    file = io.BytesIO()
    write(pandas.DataFrame(rows), file, index=False)
    return file.getvalue()


def damaged_tables(write):
    return SOUND.flatmap(lambda rows: damaged_bytes(table(write, rows)))


damaged_lines = st.one_of(
    SOUND.flatmap(changed).map(lines),
    SOUND.flatmap(changed).map(json.dumps).map(str.encode),
    SOUND.flatmap(lambda rows: damaged_bytes(lines(rows))),
)
DATA = {
    ".jsonl": damaged_lines,
    ".json": damaged_lines,
    ".csv": damaged_tables(pandas.DataFrame.to_csv),
    ".parquet": damaged_tables(pandas.DataFrame.to_parquet),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files of pandas
@pytest.mark.parametrize("ending", DATA)
def test_damaged_data_is_read_or_refused(ending, tmp_path):
    path = tmp_path / f"data{ending}"

    def check(content):
        path.write_bytes(content)
        try:
            found = read_conversations(DataOptions(data=str(path))).examples
        except DataError:
            return
        assert all(conversation.has_answer for conversation in found)

    fuzz(check, DATA[ending], 250)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()  # of pandas' open files now, not in whichever test comes next


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")
def test_a_damaged_adapter_is_ranked_or_refused(tiny, tmp_path):
    """Its config and its weights; what is loaded must be what a ranking then names."""
    folder = shutil.copytree(tiny / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = (folder / "adapter_model.safetensors").read_bytes()
    files = st.one_of(
        st.tuples(damaged_json(config), st.just(weights)),
        st.tuples(st.just(json.dumps(config).encode()), damaged_bytes(weights)),
    )

    def check(content):
        (folder / "adapter_config.json").write_bytes(content[0])
        (folder / "adapter_model.safetensors").write_bytes(content[1])
        model = load_model(ModelOptions(model=str(tiny / "model")))
        try:
            updates = adapter_updates(load_adapter(model, str(folder)))
        except ModelError:
            return
        assert updates

    fuzz(check, files, 600)


def test_a_damaged_scan_of_spectrum_is_imported_or_refused(tiny, tmp_path):
    path, ranking = scan_of(tmp_path), tmp_path / "ranking.json"

    def check(damaged):
        path.write_bytes(damaged)
        ranking.unlink(missing_ok=True)
        if run("import", path, "--model", tiny / "model", "--output", ranking) == 0:
            assert run("show", ranking) == 0

    fuzz(check, damaged_json(json.loads(path.read_text())), 400)
