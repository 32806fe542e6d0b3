# SPDX-License-Identifier: Apache-2.0
"""Which model an answer is of: by weights, config, generation config and tokenizer."""

import json
import shutil

import pytest

from scripted_judge import endpoint
from test_judge import judge, rows

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


def found(folder, adapter=None, *, is_hashed=True):
    """Identity of the base, or of an adapter of it."""
    from keylayers.evaluation.judge.models import find_models
    from keylayers.evaluation.judge.options import JudgedOptions

    adapters = () if adapter is None else (str(adapter),)
    options = JudgedOptions(model=str(folder), adapter=adapters)
    return find_models(options, None, is_hashed=is_hashed)[-1].identity


@pytest.fixture
def copy(tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "copy")
    return tmp_path / "copy"


def change(name, **values):
    def changed(folder):
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return changed


def other_tokenizer(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(folder)


CHANGES = {
    "rope": change("config.json", rope_parameters={"rope_theta": 5.0, "rope_type": "default"}),
    "end": change("generation_config.json", eos_token_id=[2, 7]),
    "no generation config": lambda folder: (folder / "generation_config.json").unlink(),
    "tokenizer": other_tokenizer,
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_answers_is_another_model_and_a_copy_is_not(tiny, copy, name):
    adapter = tiny / "adapter"
    before = (found(tiny / "model"), found(tiny / "model", adapter))
    assert (found(copy), found(copy, adapter)) == before
    CHANGES[name](copy)
    after = (found(copy), found(copy, adapter))
    assert len({*before, *after}) == 4


def test_a_model_whose_end_token_was_changed_answers_anew(tiny, copy, tmp_path):
    question = {"question_id": 1, "category": "math", "turns": ["What does the fox eat?"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(question) + "\n")
    output = tmp_path / "out"
    with endpoint(("rate",)) as script:
        assert judge(tiny, tmp_path, script, output, "--checkpoint", copy) == 0
        change("generation_config.json", eos_token_id=list(range(5, 400)))(copy)
        assert judge(tiny, tmp_path, script, output, "--checkpoint", copy) == 0
    said = [rows(path)[0]["turns"] for path in (output / "answers").glob("checkpoint-*")]
    assert len(said) == 2
    assert [""] in said


DAMAGED = ["{", "[]", "[" * 100_000, '"\\ud800']


@pytest.mark.parametrize("content", DAMAGED, ids=lambda one: one[:9])
def test_a_damaged_file_beside_the_weights_is_one_line(copy, content):
    from keylayers.errors import ModelError

    (copy / "generation_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"generation_config.json of .* must be a JSON object"):
        found(copy)


def test_a_dry_run_fetches_no_weights(tiny, tmp_path, monkeypatch, capsys):
    """Of a model whose weights are not in the hub's cache, which stands for the hub here."""
    from huggingface_hub import constants

    from keylayers.errors import ModelError

    kept = tmp_path / "models--me--model"
    shutil.copytree(
        tiny / "model",
        kept / "snapshots" / ("0" * 40),
        ignore=shutil.ignore_patterns("*.safetensors"),
    )
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="must hold its weights as safetensors"):
        found("me/model")
    assert found("me/model", is_hashed=False) == ""
    question = {"question_id": 1, "category": "math", "turns": ["What does the fox eat?"]}
    (tmp_path / "q.jsonl").write_text(json.dumps(question) + "\n")
    with endpoint(("rate",)) as script:
        more = ("--dry-run", "--no-base", "--checkpoint", "me/model")
        assert judge(tiny, tmp_path, script, tmp_path / "out", *more) == 0
    assert "answers           1 turns to give, 0 are there" in capsys.readouterr().out


def test_a_dry_run_refuses_a_folder_without_weights(copy):
    from keylayers.errors import ModelError

    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="must hold its weights as safetensors"):
        found(copy, is_hashed=False)
