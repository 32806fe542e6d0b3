# SPDX-License-Identifier: Apache-2.0
"""A hub on loopback: it takes what `huggingface_hub` uploads, by the hub's own protocol.

Run as a program it prints its address and serves until it is stopped; everything that it got lies
below the folder that is its argument, and `requests.txt` there has every request.
"""

import base64
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

TOKEN = "hf_" + "a" * 34


class Hub(BaseHTTPRequestHandler):
    root: Path

    def log_message(self, *arguments):
        pass

    def _answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _note(self):
        with (self.root / "requests.txt").open("a") as file:
            file.write(f"{self.command} {self.path}\n")

    def do_GET(self):
        self._note()
        self._answer({"error": "not found"}, 404)

    do_HEAD = do_GET

    def do_POST(self):
        self._note()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid credentials"}, 401)
        elif self.path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(part for part in (wanted.get("organization"), wanted["name"]) if part)
            if (self.root / name).exists():
                self._answer({"error": "exists", "url": f"{self.server.address}/{name}"}, 409)
                return
            (self.root / name).mkdir(parents=True)
            (self.root / name / ".created.json").write_text(json.dumps(wanted))
            self._answer({"url": f"{self.server.address}/{name}", "id": "1", "name": name})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", self.path):
            files = json.loads(body)["files"]
            modes = [{"path": file["path"], "uploadMode": "regular"} for file in files]
            self._answer({"files": [mode | {"shouldIgnore": False} for mode in modes]})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/([^?]+).*", self.path):
            for line in body.decode().splitlines():
                operation = json.loads(line)
                if operation["key"] == "file":
                    path = self.root / match[1] / operation["value"]["path"]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(base64.b64decode(operation["value"]["content"]))
            url = f"{self.server.address}/{match[1]}/commit/{'0' * 40}"
            self._answer({"success": True, "commitOid": "0" * 40, "commitUrl": url})
        else:
            self._answer({"error": f"unknown {self.path}"}, 500)


if __name__ == "__main__":
    Hub.root = Path(sys.argv[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address = f"http://127.0.0.1:{server.server_port}"
    sys.stdout.write(server.address + "\n")
    sys.stdout.flush()
    server.serve_forever()
