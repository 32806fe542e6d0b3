# SPDX-License-Identifier: Apache-2.0
"""`--push-to-hub` against a hub on loopback that speaks the hub's protocol."""

import base64
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from commands import STEPS, complaint, keylayers

pytestmark = pytest.mark.allow_hosts(["127.0.0.1"])
TOKEN = "hf_" + "a" * 34
COMMIT = "0" * 40


class Hub(BaseHTTPRequestHandler):
    """Keeps what `huggingface_hub` uploads below `server.root`."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self._answer({"error": "not found"}, 404)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/(.+)/preupload/(.+)", self.path):
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            files = json.loads(body)["files"]
            self._answer({"files": [{"path": file["path"]} | mode for file in files]})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/([^?]+).*", self.path):
            self._commit(match[1], map(json.loads, body.decode().splitlines()))
        else:
            self._answer({"error": f"unknown {self.path}"}, 500)

    def _create(self, wanted):
        name = "/".join(part for part in (wanted.get("organization"), wanted["name"]) if part)
        url, folder = f"{self.server.address}/{name}", self.server.root / name
        if folder.exists():
            self._answer({"error": "exists", "url": url}, 409)
            return
        folder.mkdir(parents=True)
        (folder / ".created.json").write_text(json.dumps(wanted))
        self._answer({"url": url, "id": "1", "name": name})

    def _commit(self, name, operations):
        for operation in operations:
            if operation["key"] == "file":
                path = self.server.root / name / operation["value"]["path"]
                path.write_bytes(base64.b64decode(operation["value"]["content"]))
        url = f"{self.server.address}/{name}/commit/{COMMIT}"
        self._answer({"success": True, "commitOid": COMMIT, "commitUrl": url})

    def _answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Its folder and its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.root, server.address = tmp_path / "hub", f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    go_online(monkeypatch, server.address)
    yield server.root, server.address
    server.shutdown()
    thread.join()
    server.server_close()


def go_online(monkeypatch, address, token=TOKEN):
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
    assert TOKEN not in written + out + err


def test_what_was_pruned_is_pushed_to_a_repository_that_exists(hub, ranked, tmp_path):
    (hub[0] / "me/cut").mkdir(parents=True)
    more = ("--budget", "5", "--output", tmp_path / "out", "--push-to-hub", "me/cut")
    assert keylayers("prune", "--ranking", ranked, *more) == 0
    assert files_of(hub[0] / "me/cut") == files_of(tmp_path / "out")


@pytest.mark.long
def test_plain_peft_pushes_the_adapter(hub, pruned):
    """In a process of its own: PEFT asks the hub that was known when it was imported."""
    code = (
        "import sys; from peft import AutoPeftModelForCausalLM as Auto; "
        "Auto.from_pretrained(sys.argv[1]).push_to_hub('me/by-peft')"
    )
    own = {"HF_ENDPOINT": hub[1], "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-W", "ignore", "-c", code, str(pruned)]
    subprocess.run(command, check=True, env={**os.environ, **own})
    pushed = files_of(hub[0] / "me/by-peft")
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= set(pushed)


WRONG_TOKEN = "hf_wrong"
# how the hub is reached (None: not at all), arguments, what the line says
REFUSED = [
    (("hub", WRONG_TOKEN), ["--push-to-hub", "me/x"], "the hub must take 'me/x', but did not: "),
    (("http://127.0.0.1:9", TOKEN), ["--push-to-hub", "me/x"], "the hub must take 'me/x', but did"),
    (None, ["--push-to-hub", "a/b/c"], "`push_to_hub` must be a name on the hub, such as me/my-"),
    (None, ["--push-to-hub", "me/x"], "must be pushed online, but HF_HUB_OFFLINE is set"),
    (None, ["--private"], "`private` must be left out without `push_to_hub`"),
]


@pytest.mark.parametrize(("online", "arguments", "line"), REFUSED)
@pytest.mark.parametrize("command", ["train", "prune"])
def test_what_cannot_be_pushed_is_one_line_before_any_work(
    request, ranked, tmp_path, monkeypatch, capsys, command, online, arguments, line
):
    if online is not None:
        address, token = online
        address = request.getfixturevalue("hub")[1] if address == "hub" else address
        go_online(monkeypatch, address, token)
    capsys.readouterr()
    more = ("--budget", "3", "--output", tmp_path / "out", *arguments)
    assert keylayers(command, "--ranking", ranked, *more) == 2
    found = complaint(capsys)
    assert line in found
    assert WRONG_TOKEN not in found
    assert not (tmp_path / "out").exists()
