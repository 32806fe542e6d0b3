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

from rankings import ranking_of, verification_of

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings(LARGE)]
MADE_BY = {
    "environment": {"keylayers": "0.1.0", "commit": None, "libraries": {"torch": "2"}},
    "model": {"name": "org/base", "weights_sha256": "0"},
    "data": {"data": "d.jsonl", "content_sha256": "1", "split_sha256": "2", "num_train": 3},
    "options": {"model": "org/base", "data": "d.jsonl", "seed": 0, "lora_rank": 8},
    "stage_1": {"num_steps": 2, "stopped_by": "stable", "seconds": 1.5, "losses": [3.0, 2.0]},
    "mask": {"losses": [2.0, 1.0], "seconds": 1.0, "score_unit": "nats per token"},
    "held_out_loss_nats": {"base": 3.0, "tuned": 2.0},
    "adalora_ranks_left": {"model.layers.0.a_proj": 3},
}


def by_hand():
    scores = [0.9, 0.5, None, 0.45, 0.5, 0.1]
    sizes, errors = [10, 20, 30, 40, 50, 60], [0.04, 0.04, None, 0.04, 0.04, 0.04]
    return ranking_of(scores, num_parameters=sizes, errors=errors, provenance=MADE_BY)


def check_ranking(path):
    """What was accepted is a ranking: finite scores, in order, the same after a round trip."""
    from keylayers.ranking.ranking import Ranking

    ranking = Ranking.load(path)
    scores = [module.score for module in ranking.ordered()]
    known = [score for score in scores if score is not None]
    assert all(math.isfinite(score) for score in known)
    assert known == sorted(known, reverse=True)
    assert scores[len(known) :] == [None] * (len(scores) - len(known))
    assert Ranking.from_json(json.loads(json.dumps(ranking.to_json())), "again") == ranking


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a sound ranking and its verification."""
    monkeypatch.chdir(tmp_path)
    by_hand().save(tmp_path / "good.json")
    found = verification_of(by_hand(), provenance=MADE_BY)
    found = found.model_copy(update={"leave_one_out": found.best_first})
    found.save(tmp_path / "good.verification.json")
    return tmp_path


# Commands on a damaged ranking, `bad.json`, and on a damaged verification of `good.json`.
RANKING = [
    "show bad.json",
    "show bad.json --json",
    "show bad.json --budget 0.5x-params",
    "compare bad.json good.json --budget 2",
    "compare good.json bad.json --json --consensus new/consensus.json",
    "export bad.json --budget 2 --to peft --output new/out",
    "export bad.json --budget 0.6x-time --to axolotl --output new/out",
    "show bad.json --figure new/heatmap.svg new/losses.svg",
    "show bad.json good.json --html new/report.html",
]
VERIFICATION = [
    "export good.json --budget auto --to trl --output new/out",
    "show good.json --figure new/curve.svg",
]


@pytest.mark.parametrize("command", [*RANKING, *VERIFICATION])
def test_a_damaged_ranking_or_verification_is_refused_or_right(command, folder):
    path = folder / ("bad.json" if command in RANKING else "good.verification.json")
    whole = json.loads((folder / path.name.replace("bad", "good")).read_text())
    begin(*command.replace("bad", "good").split())

    def check(content):
        shutil.rmtree("new", ignore_errors=True)
        (folder / "new").mkdir()
        path.write_bytes(content)
        if run(*command.split()) == 0 and command in RANKING:
            check_ranking(path)

    fuzz(check, damaged_json(whole), 1000)


def test_links_in_a_circle_are_refused(folder):
    for name, target in (("a.json", "b.json"), ("b.json", "a.json"), ("dir", "dir")):
        (folder / name).symlink_to(folder / target)
    for name in ("a.json", "dir"):
        assert run("show", name) == 2
        assert run("show", name, "--html", "r.html") == 2
        assert run("export", name, "--budget", "1", "--to", "peft") == 2


OPTIONS = {
    "model": "nowhere",
    "data": "nowhere.jsonl",
    "max_steps": 3,
    "epsilon": 0.1,
    "held_out": 0.2,
    "load_in_4bit": False,
    "method": "path",
    "report_to": ["tensorboard"],
    "seed": 1,
}


@pytest.mark.parametrize("command", ["rank", "train"])
def test_a_damaged_yaml_file_is_one_line(command, tmp_path, monkeypatch):
    """No model is there, so that even a sound file ends in a line."""
    monkeypatch.chdir(tmp_path)
    begin(command, "--model", "nowhere", "--data", "nowhere.jsonl")

    def check(content):
        (tmp_path / "run.yaml").write_bytes(content)
        assert run(command, "--config", "run.yaml", "--output", "out") == 2
        assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]

    fuzz(check, damaged_yaml(OPTIONS), 800)


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
    from keylayers.model.loading import load_adapter, load_model
    from keylayers.model.options import ModelOptions
    from keylayers.updates import adapter_updates

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
    from test_spectrum_file import scan_of

    path, ranking = scan_of(tmp_path), tmp_path / "ranking.json"

    def check(damaged):
        path.write_bytes(damaged)
        ranking.unlink(missing_ok=True)
        if run("import", path, "--model", tiny / "model", "--output", ranking) == 0:
            assert run("show", ranking) == 0

    fuzz(check, damaged_json(json.loads(path.read_text())), 400)
