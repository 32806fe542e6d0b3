# SPDX-License-Identifier: Apache-2.0
"""What SECURITY.md promises: no secret is written, nothing leaves the output folder."""

import re
from pathlib import Path

from commands import STEPS, everything_below, keylayers, rank

from rankings import ranking_of

SECRET = "hf_" + "kEyLaYeRs" * 4
NAMES = "HF_TOKEN HUGGING_FACE_HUB_TOKEN OPENAI_API_KEY WANDB_API_KEY AWS_SECRET_ACCESS_KEY"


def test_no_key_or_token_is_in_anything_that_is_written_or_printed(
    tiny, tmp_path, monkeypatch, capfd
):
    for name in NAMES.split():
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    out, more = tmp_path / "out", ("--output", tmp_path / "tuned")
    assert rank(tiny, out, "--report-to", "tensorboard") == 0
    budget = ("--ranking", out, "--budget", "3")
    for words in (
        ("verify", "--ranking", out, "--random-orders", "1"),
        ("train", *budget, *STEPS, *more),
        ("prune", *budget, "--output", tmp_path / "cut"),
        ("export", out, "--budget", "3", "--to", "peft", "--output", tmp_path / "e"),
        ("show", out, "--html", tmp_path / "r.html", "--figure", tmp_path / "heatmap.pdf"),
    ):
        assert keylayers(*words) == 0
    assert rank(tiny, tmp_path / "bad", "--model", tmp_path / "nowhere") == 2
    printed = "".join(capfd.readouterr())
    written = everything_below(tmp_path)
    assert len(written) > 25
    assert "written to" in printed
    assert [path for path, content in written.items() if SECRET.encode() in content] == []
    assert SECRET not in printed
    (tmp_path / "out" / "deep").write_bytes(b"\x00" + SECRET.encode())  # the search finds it
    assert any(SECRET.encode() in content for content in everything_below(tmp_path).values())


def test_names_in_a_ranking_lead_to_no_file_elsewhere(tiny, tmp_path):
    """A ranking from elsewhere may name its modules, its model and its data as it likes."""
    from dataclasses import replace

    ranking = ranking_of([1.0, 0.5], provenance={"model": {"name": "../../outside"}})
    names = ("../../outside/x", "/tmp/keylayers-outside")
    modules = tuple(replace(m, name=n) for m, n in zip(ranking.modules, names, strict=True))
    folder = tmp_path / "in" / "side"
    folder.mkdir(parents=True)
    replace(ranking, modules=modules).save(folder / "r.json")
    before = set(tmp_path.rglob("*"))
    for tool in ("peft", "trl", "axolotl", "llamafactory"):
        output = ("--output", folder / tool)
        words = ("export", folder / "r.json", "--budget", "1", "--to", tool, *output)
        assert keylayers(*words) in (0, 2)
    assert keylayers("show", folder / "r.json", "--html", folder / "r.html") == 0
    made = set(tmp_path.rglob("*")) - before
    assert all(folder in path.parents for path in made)
    assert made
    assert not Path("/tmp/keylayers-outside").exists()


BANNED = re.compile(
    r"(?<![.\w])(?<!def )(eval|exec)\("
    r"|^\s*(from|import) (pickle|marshal|shelve|socketserver|http)\b"
    r"|socket\.socket\b|create_server\b|\.(bind|listen)\("  # a study may only call a Ray cluster
    r"|torch\.load\(|yaml\.(unsafe_)?load\(|os\.system\(|shell=True"
)


def test_nothing_in_the_source_runs_code_from_files_or_opens_a_port():
    source = Path(__file__).resolve().parents[1] / "src"
    found = [
        (path.name, line)
        for path in sorted(source.rglob("*.py"))
        for line in path.read_text().splitlines()
        if BANNED.search(line)
    ]
    assert found == []
    assert all(BANNED.search(line) for line in ("x = eval(y)", "import pickle", "torch.load(f)"))
