# SPDX-License-Identifier: Apache-2.0
"""Generated damage to YAML, data, adapters, scans and records: one line, or a right result."""

import gc
import io
import json
import shutil
import warnings

import pandas
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from damage import LARGE, begin, cases, changed, damaged_bytes, damaged_json, damaged_text, run

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings(LARGE)]
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
yaml_files = st.one_of(
    changed(OPTIONS)
    .filter(lambda content: isinstance(content, dict) and len(str(content)) < 4000)
    .filter(lambda content: "\ud800" not in str(content))
    .map(lambda content: yaml.safe_dump(content).encode()),
    damaged_text(yaml.safe_dump(OPTIONS)),
)


@pytest.mark.parametrize("command", ["rank", "train"])
def test_a_damaged_yaml_file_is_one_line(command, tmp_path_factory, monkeypatch):
    """No model is there, so that even a sound file ends in a line."""
    folder = tmp_path_factory.mktemp("yaml")
    monkeypatch.chdir(folder)
    begin(command, "--model", "nowhere", "--data", "nowhere.jsonl")

    @cases(800)
    @given(yaml_files)
    def check(content):
        (folder / "run.yaml").write_bytes(content)
        assert run(command, "--config", "run.yaml", "--output", "out") == 2
        assert sorted(path.name for path in folder.iterdir()) == ["run.yaml"]

    check()


ROW = {"prompt": "Why?", "completion": "Because."}
MESSAGES = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
ALPACA = {"instruction": "Do.", "input": "", "output": "Done."}
SHAREGPT = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
SOUND = [ROW] * 4, [MESSAGES] * 3, [ALPACA] * 3, [SHAREGPT] * 3


def lines(rows):
    rows = rows if isinstance(rows, list) else [rows]
    return "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def table(rows, ending):
    file = io.BytesIO()
    write = {".csv": pandas.DataFrame.to_csv, ".parquet": pandas.DataFrame.to_parquet}[ending]
    write(pandas.DataFrame(rows), file, index=False)
    return file.getvalue()


def data_files(ending):
    sound = st.sampled_from(SOUND)
    if ending in (".csv", ".parquet"):
        return sound.flatmap(lambda rows: damaged_bytes(table(rows, ending)))
    return st.one_of(
        sound.flatmap(changed).map(lines),
        sound.flatmap(changed).map(json.dumps).map(str.encode),
        sound.flatmap(lambda rows: damaged_bytes(lines(rows))),
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files of pandas
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_damaged_data_is_read_or_refused(ending, tmp_path_factory):
    """What is read has a text in every turn that is learned."""
    from keylayers.data.options import DataOptions
    from keylayers.data.reading import read_conversations
    from keylayers.errors import DataError

    path = tmp_path_factory.mktemp("data") / f"data{ending}"

    @cases(250)
    @given(data_files(ending))
    def check(content):
        path.write_bytes(content)
        try:
            _, found, _ = read_conversations(DataOptions(data=str(path)))
        except DataError:
            return
        assert found

    check()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()  # of pandas' open files now, not in whichever test comes next


@pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::RuntimeWarning:peft")
def test_a_damaged_adapter_is_ranked_or_refused(tiny, tmp_path_factory):
    """Its config and its weights; what is loaded must be what a ranking then names."""
    from keylayers.errors import ModelError
    from keylayers.model.loading import load_adapter, load_model
    from keylayers.model.options import ModelOptions
    from keylayers.updates import adapter_updates

    folder = tmp_path_factory.mktemp("adapters") / "adapter"
    shutil.copytree(tiny / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = (folder / "adapter_model.safetensors").read_bytes()
    files = st.one_of(
        st.tuples(damaged_json(config), st.just(weights)),
        st.tuples(st.just(json.dumps(config).encode()), damaged_bytes(weights)),
    )

    @cases(600)
    @given(files)
    def check(content):
        (folder / "adapter_config.json").write_bytes(content[0])
        (folder / "adapter_model.safetensors").write_bytes(content[1])
        model = load_model(ModelOptions(model=str(tiny / "model")))
        try:
            updates = adapter_updates(load_adapter(model, str(folder)))
        except ModelError:
            return
        assert updates

    check()


def test_a_damaged_scan_of_spectrum_is_imported_or_refused(tiny, tmp_path_factory):
    from test_spectrum_file import scan_of

    folder = tmp_path_factory.mktemp("scans")
    path = scan_of(folder)
    content = json.loads(path.read_text())

    @cases(400)
    @given(damaged_json(content))
    def check(damaged):
        path.write_bytes(damaged)
        (folder / "ranking.json").unlink(missing_ok=True)
        model = ("--model", tiny / "model", "--output", folder / "ranking.json")
        if run("import", path, *model) == 0:
            assert run("show", folder / "ranking.json") == 0

    check()
