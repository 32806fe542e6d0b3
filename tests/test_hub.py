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


@pytest.fixture
def hub(tmp_path):
    """Its folder and its address."""
    folder = tmp_path / "hub"
    folder.mkdir()
    command = [sys.executable, local_hub.__file__, str(folder)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    yield folder, server.stdout.readline().strip()
    server.send_signal(signal.SIGTERM)
    server.wait(10)
    server.stdout.close()


def online(address, code, *arguments, token=local_hub.TOKEN):
    """A process that may reach the hub, for pytest blocks sockets in its own."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_TOKEN": token,
        "HF_HUB_OFFLINE": "0",
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


MAIN = "import sys; from keylayers.cli import main; sys.exit(main(sys.argv[1:]))"


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name[0] != "."}


def test_what_was_trained_is_pushed_with_its_card(hub, ranked, tmp_path):
    folder, address = hub
    more = ("--budget", "3", *STEPS, "--output", tmp_path / "out")
    where = ("--push-to-hub", "me/tiny-best", "--private")
    done = online(address, MAIN, "train", "--ranking", ranked, *more, *where)
    assert done.returncode == 0, done.stderr
    assert f"pushed to {address}/me/tiny-best/commit/" in done.stdout
    assert files_of(folder / "me/tiny-best") == files_of(tmp_path / "out")
    assert "3 of 21 modules" in (folder / "me/tiny-best/README.md").read_text()
    assert (
        json.loads((folder / "me/tiny-best/.created.json").read_text())["visibility"] == "private"
    )
    written = b"".join(files_of(tmp_path / "out").values()).decode("utf-8", "replace")
    assert local_hub.TOKEN not in written + done.stdout + done.stderr


def test_what_was_pruned_is_pushed_from_python_too(hub, ranked, tmp_path):
    folder, address = hub
    assert keylayers("prune", "--ranking", ranked, "--budget", "3", "--output", tmp_path / "p") == 0
    code = "import sys, keylayers; print(keylayers.push_to_hub(sys.argv[1], 'me/cut'))"
    done = online(address, code, tmp_path / "p")
    assert done.returncode == 0, done.stderr
    assert files_of(folder / "me/cut") == files_of(tmp_path / "p")


def test_plain_peft_pushes_the_adapter(hub, ranked, tmp_path):
    folder, address = hub
    assert keylayers("prune", "--ranking", ranked, "--budget", "3", "--output", tmp_path / "p") == 0
    code = (
        "import sys; from peft import AutoPeftModelForCausalLM as Auto; "
        "Auto.from_pretrained(sys.argv[1]).push_to_hub('me/by-peft'); "
        "assert 'keylayers' not in sys.modules"
    )
    done = online(address, code, tmp_path / "p")
    assert done.returncode == 0, done.stderr
    pushed = files_of(folder / "me/by-peft")
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(pushed)


def test_a_wrong_token_is_one_line_before_any_training(hub, ranked, tmp_path):
    _, address = hub
    more = ("--budget", "3", *STEPS, "--output", tmp_path / "out", "--push-to-hub", "me/x")
    done = online(address, MAIN, "train", "--ranking", ranked, *more, token="hf_wrong")
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("keylayers: the hub must take 'me/x', but did not: ")
    assert "Traceback" not in done.stderr
    assert "hf_wrong" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_hub_that_cannot_be_reached_is_one_line(ranked, tmp_path):
    more = ("--budget", "3", "--output", tmp_path / "out", "--push-to-hub", "me/x")
    done = online("http://127.0.0.1:9", MAIN, "prune", "--ranking", ranked, *more)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("keylayers: the hub must take 'me/x', but did")
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


def test_a_folder_of_others_is_not_pushed(tmp_path):
    import keylayers

    with pytest.raises(keylayers.KeylayersError, match="must be one that keylayers wrote"):
        keylayers.push_to_hub(tmp_path, "me/x")
