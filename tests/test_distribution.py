# SPDX-License-Identifier: Apache-2.0
"""What is published: a wheel with the whole package and nothing else, and sources that build it."""

import email
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from hatchling.build import build_sdist, build_wheel

import keylayers
import preloaded

ROOT = Path(__file__).resolve().parents[1]
NAME = f"keylayers-{keylayers.__version__}"
INFO = f"{NAME}.dist-info"
# What is no Python in the package. A new file belongs here if the package reads it.
DATA = """py.typed demo/world.json
demo/base/chat_template.jinja demo/base/config.json demo/base/generation_config.json
demo/base/model.safetensors demo/base/tokenizer.json demo/base/tokenizer_config.json
report/page/model_card.md report/page/page.css report/page/page.html report/page/page.js
report/page/parts.js report/page/study.html"""
METADATA = "METADATA WHEEL entry_points.txt licenses/LICENSE RECORD"
SOURCES = """.gitignore CHANGELOG.md CITATION.cff LICENSE PKG-INFO README.md docs examples
pyproject.toml src"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of wheel and sources, built from this repository, as pip and others do."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        build_sdist(str(folder))
        build_wheel(str(folder))
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    return built / f"{NAME}-py3-none-any.whl"


def test_the_wheel_holds_all_of_the_package_and_nothing_else(wheel):
    source = ROOT / "src" / "keylayers"
    code = {path.relative_to(source.parent).as_posix() for path in source.rglob("*.py")}
    assert len(code) > 100
    data = {f"keylayers/{name}" for name in DATA.split()}
    about = {f"{INFO}/{name}" for name in METADATA.split()}
    with zipfile.ZipFile(wheel) as file:
        assert set(file.namelist()) == code | data | about
        model = file.read("keylayers/demo/base/model.safetensors")
    assert model == (source / "demo" / "base" / "model.safetensors").read_bytes()


def test_the_sources_build_the_same_wheel(built, wheel, tmp_path, monkeypatch):
    with tarfile.open(built / f"{NAME}.tar.gz") as file:
        file.extractall(tmp_path, filter="data")
    unpacked = tmp_path / NAME
    assert {path.name for path in unpacked.iterdir()} == set(SOURCES.split())
    for folder in ("docs", "examples"):
        kept = {path.name for path in (ROOT / folder).iterdir()}
        assert {path.name for path in (unpacked / folder).iterdir()} == kept
    monkeypatch.chdir(unpacked)
    again = build_wheel(str(tmp_path))
    assert (tmp_path / again).read_bytes() == wheel.read_bytes()


def test_the_page_of_the_package_names_no_file_and_no_place_of_the_repository(wheel):
    with zipfile.ZipFile(wheel) as file:
        page = email.message_from_bytes(file.read(f"{INFO}/METADATA"))
    assert page["Version"] == keylayers.__version__
    assert page["Summary"] == keylayers.__doc__.splitlines()[0]
    assert page.get_all("Project-URL") == ["Paper, https://arxiv.org/abs/2410.17875"]
    text = page.get_payload(decode=True).decode()
    assert page["Description-Content-Type"] == "text/markdown"
    assert set(re.findall(r"\]\(([^)]*)\)", text)) == {"https://arxiv.org/abs/2410.17875"}
    readme = (ROOT / "README.md").read_text()
    for line in readme.splitlines():
        if "](" not in line:
            assert line in text, line
    links = re.findall(r"(?<!!)\[([^\]]*)\]\(", readme)
    assert links
    for name in links:
        assert " ".join(name.split()) in " ".join(text.split()), name


def test_the_citation_names_the_package_and_the_paper():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (paper,) = cited["references"]
    assert (cited["title"], cited["license"]) == ("keylayers", "Apache-2.0")
    assert paper["title"] == "Understanding Layer Significance in LLM Alignment"
    names = ", ".join(author["family-names"] for author in paper["authors"])
    source = (ROOT / "src" / "keylayers" / "scores" / "ila.py").read_text()
    assert f'Source: {names}: "{paper["title"]}"' in source
    assert paper["url"] == "https://arxiv.org/abs/2410.17875"


@pytest.mark.long
def test_the_wheel_works_without_the_repository(wheel, tmp_path):
    """Installed in a folder that comes first on the path, and run from an empty one."""
    place, work = tmp_path / "installed", tmp_path / "work"
    work.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", place, wheel], check=True)

    def run(*words):
        done = subprocess.run(
            [preloaded.python(), *words],
            cwd=work,
            env={**os.environ, "PYTHONPATH": str(place)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    printed = run("-c", "import keylayers; print(keylayers.__file__)")
    assert printed.strip() == str(place / "keylayers" / "__init__.py")
    command = ("-m", "keylayers")
    assert run(*command, "--version").strip() == keylayers.__version__
    run(*command, "demo", "--files-only", "--output", "demo")
    few = ("--max-steps", "2", "--mask-batches", "1", "--max-examples", "40", "--lora-rank", "2")
    data = ("--model", "demo/model", "--data", "demo/polite.jsonl")
    assert "56 modules, " in run(*command, "rank", *data, *few, "--output", "out")
    assert "56 modules, " in run(*command, "show", "out")
    run(*command, "show", "out", "--html", "out.html")
    assert "<html" in (work / "out.html").read_text()
    chosen = ("--ranking", "out", "--budget", "0.3", "--steps", "1")
    run(*command, "train", *chosen, "--output", "tuned")
    assert "keylayers" in (work / "tuned" / "README.md").read_text()
