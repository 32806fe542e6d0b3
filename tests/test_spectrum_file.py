# SPDX-License-Identifier: Apache-2.0
"""Scans by Spectrum become rankings: those of a tiny model by hand, and published ones."""

import json

import pytest
import yaml
from transformers import LlamaConfig, MistralConfig

from commands import complaint, keylayers
from keylayers.model.modules import map_modules
from keylayers.ranking.ranking import Ranking
from tiny_files import tiny_model, tiny_tokenizer

SIZES = {"hidden_size": 4096, "intermediate_size": 14_336, "num_key_value_heads": 8}
PUBLISHED = {
    "snr_meta-llama-Meta-Llama-3.1-8B.json": LlamaConfig(vocab_size=128_256, **SIZES),
    "snr_mistralai-Mistral-7B-v0.1.json": MistralConfig(**SIZES),
}


def scan_of(folder, change=lambda rows: None):
    """A scan of the tiny model, changed or replaced by a text: ratios fall, norms are infinite."""
    places = enumerate(map_modules(tiny_model(len(tiny_tokenizer()))))
    rows = {one.name: {"snr": 100.0 - place, "type": one.projection} for place, one in places}
    rows["model.norm"] = {"snr": float("inf"), "type": "model.norm"}
    path = folder / "snr_results_tiny.json"
    if callable(change):
        change(rows)
    path.write_text(json.dumps(rows) if callable(change) else change)
    return path


def test_a_module_scores_by_its_place_in_its_kind(tiny, tmp_path, capsys):
    last = "model.layers.2.mlp.up_proj"
    scan = scan_of(tmp_path, lambda rows: rows[last].update(snr=float("inf")))
    output = tmp_path / "r.json"
    assert keylayers("import", scan, "--model", tiny / "model", "--output", output) == 0
    assert "21 modules ranked, 1 of them" in " ".join(capsys.readouterr().out.split())
    ranking = Ranking.load(output)
    scores = {one.name: one.score for one in ranking.modules}
    assert len(scores) == 21
    for kind in ("self_attn.q_proj", "mlp.down_proj"):
        own = [scores[f"model.layers.{block}.{kind}"] for block in range(3)]
        assert own == pytest.approx([1.0, 2 / 3, 1 / 3])
    assert scores[last] == 1.0
    assert scores["model.layers.0.mlp.up_proj"] == pytest.approx(2 / 3)
    assert (ranking.method, ranking.made_by.imported.num_left_out) == ("spectrum", 1)
    assert keylayers("import", scan, "--model", tiny / "model", "--output", output) == 2
    assert "must be a new file" in complaint(capsys)


BAD = [
    (lambda rows: rows.clear(), "but it is empty"),
    (lambda rows: rows.pop("model.layers.1.mlp.up_proj"), "it lacks 1 of its 21 modules"),
    (lambda rows: rows["model.norm"].update(snr=float("nan")), "got nan"),
    (lambda rows: rows["model.norm"].update(snr=-1), "got -1"),
    (lambda rows: rows["model.norm"].update(snr="1"), "got '1'"),
    (lambda rows: rows.update(odd=3), "`odd` must be a mapping, got 3"),
    *((text, "snr_results_tiny.json") for text in ("", "[]", "{", "3")),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_bad_scan_is_refused(tiny, tmp_path, capsys, change, message):
    output = tmp_path / "r.json"
    scan = scan_of(tmp_path, change)
    assert keylayers("import", scan, "--model", tiny / "model", "--output", output) == 2
    assert message in complaint(capsys)
    assert not output.exists()


def test_a_missing_scan_or_model_is_refused(tiny, tmp_path, capsys):
    for scan, model, message in (
        (tmp_path / "none.json", tiny / "model", "the scan must exist, but there is no"),
        (scan_of(tmp_path), tmp_path, "holds no config.json"),
    ):
        assert keylayers("import", scan, "--model", model) == 2
        assert message in complaint(capsys)


def test_published_scans_are_shown_compared_and_exported(shared, tmp_path, capsys):
    scans = shared / "data" / "spectrum"
    files = [tmp_path / f"ranking-{name}" for name in PUBLISHED]
    for file, (name, config) in zip(files, PUBLISHED.items(), strict=True):
        config.save_pretrained(tmp_path / name)
        options = ("--model", tmp_path / name, "--output", file)
        assert keylayers("import", scans / name, *options) == keylayers("show", file) == 0
    assert keylayers("compare", *files, "--budget", "0.5") == 0
    assert "0.33" in capsys.readouterr().out  # two random halves share a third
    ranking = Ranking.load(files[0])
    assert len(ranking.modules) == 224
    scan = json.loads((scans / next(iter(PUBLISHED))).read_text())
    for kind in ("self_attn.q_proj", "mlp.down_proj"):
        rows = {name: row["snr"] for name, row in scan.items() if row["type"] == kind}
        best = sorted(rows, key=lambda name: -rows[name])[:8]
        scores = {one.name: one.score for one in ranking.modules if one.name in rows}
        assert {name for name, score in scores.items() if score > 1 - 8 / 32} == set(best)
    words = ["--budget", "0.25", "--to", "axolotl", "--update", "full", "--output"]
    assert keylayers("export", files[0], *words, tmp_path / "e") == 0
    patterns = yaml.safe_load((tmp_path / "e" / "axolotl.yaml").read_text())
    assert len(patterns["unfrozen_parameters"]) == 7
