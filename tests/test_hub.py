# SPDX-License-Identifier: Apache-2.0
"""`--push-to-hub` against a hub on loopback that speaks the hub's protocol."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import local_hub
from commands import STEPS, complaint, keylayers

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Its folder and its address."""
    folder = tmp_path / "hub"
    folder.mkdir()
    command = [sys.executable, local_hub.__file__, str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    address = server.stdout.readline().strip()
    go_online(monkeypatch, address)
    yield folder, address
    server.send_signal(signal.SIGTERM)
    server.wait(10)
    server.stdout.close()


def go_online(monkeypatch, address, token=local_hub.TOKEN):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", token)


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


def test_what_was_trained_is_pushed_with_its_card(hub, ranked, tmp_path, capsys):
    folder, address = hub
    more = ("--budget", "3", *STEPS, "--output", tmp_path / "out")
    where = ("--push-to-hub", "me/tiny-best", "--private")
    assert keylayers("train", "--ranking", ranked, *more, *where) == 0
    out, err = capsys.readouterr()
    assert f"pushed to {address}/me/tiny-best/commit/" in out
    pushed = folder / "me/tiny-best"
    assert files_of(pushed) == files_of(tmp_path / "out")
    assert "3 of 21 modules" in (pushed / "README.md").read_text()
    assert json.loads((pushed / ".created.json").read_text())["visibility"] == "private"
    written = b"".join(files_of(tmp_path / "out").values()).decode("utf-8", "replace")
    assert local_hub.TOKEN not in written + out + err


def test_what_was_pruned_is_pushed_from_python_too(hub, pruned):
    from keylayers.apply.hub import push_to_hub

    folder, _ = hub
    push_to_hub(pruned, "me/cut")
    assert files_of(folder / "me/cut") == files_of(pruned)


@pytest.mark.long
def test_plain_peft_pushes_the_adapter(hub, pruned):
    """In a process of its own: PEFT asks the hub that was known when it was imported."""
    folder, address = hub
    code = (
        "import sys; from peft import AutoPeftModelForCausalLM as Auto; "
        "Auto.from_pretrained(sys.argv[1]).push_to_hub('me/by-peft')"
    )
    own = {"HF_ENDPOINT": address, "HF_TOKEN": local_hub.TOKEN, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(pruned)]
    subprocess.run(command, check=True, env={**os.environ, **own})
    pushed = files_of(folder / "me/by-peft")
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(pushed)


def test_a_wrong_token_is_one_line_before_any_training(hub, ranked, tmp_path, monkeypatch, capsys):
    go_online(monkeypatch, hub[1], token="hf_wrong")
    more = ("--budget", "3", *STEPS, "--output", tmp_path / "out", "--push-to-hub", "me/x")
    assert keylayers("train", "--ranking", ranked, *more) == 2
    line = complaint(capsys)
    assert line.startswith("keylayers: the hub must take 'me/x', but did not: ")
    assert "hf_wrong" not in line
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached_is_one_line(ranked, tmp_path, monkeypatch, capsys):
    go_online(monkeypatch, "http://127.0.0.1:9")
    more = ("--budget", "3", "--output", tmp_path / "out", "--push-to-hub", "me/x")
    assert keylayers("prune", "--ranking", ranked, *more) == 2
    assert complaint(capsys).startswith("keylayers: the hub must take 'me/x', but did")
    assert not (tmp_path / "out").exists()


REFUSED = [
    (["--push-to-hub", "a/b/c"], "`push_to_hub` must be a name on the hub, such as me/my-adapter"),
    (["--push-to-hub", "me/x"], "must be pushed online, but HF_HUB_OFFLINE is set"),
    (["--private"], "`private` must be left out without `push_to_hub`"),
]


@pytest.mark.parametrize(("arguments", "line"), REFUSED)
def test_what_cannot_be_pushed_is_refused_before_any_work(
    ranked, tmp_path, capsys, arguments, line
):
    capsys.readouterr()
    more = ("--budget", "3", "--output", tmp_path / "out", *arguments)
    assert keylayers("train", "--ranking", ranked, *more) == 2
    assert line in complaint(capsys)
    assert not Path(tmp_path / "out").exists()
