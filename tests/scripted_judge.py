# SPDX-License-Identifier: Apache-2.0
"""An endpoint on loopback that speaks OpenAI's protocol for chats as badly as it is told to.

Tests that ask it must allow 127.0.0.1, for pytest blocks sockets.
"""

import hashlib
import json
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Script:
    """What an endpoint does for each request in turn, the last step for all that follow.

    `asked` gets every request for a chat, and `address` is where it is.
    """

    def __init__(self, *steps):
        self.steps = list(steps)
        self.asked = []
        self.lock = threading.Lock()
        self.address = ""

    def next(self, request):
        with self.lock:
            self.asked.append(request)
            return self.steps.pop(0) if len(self.steps) > 1 else self.steps[0]


@contextmanager
def endpoint(*steps):
    """An endpoint that follows a script, for the length of the block."""
    script = Script(*steps)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Told", (Endpoint,), {"script": script}))
    script.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield script
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Endpoint(BaseHTTPRequestHandler):
    script: Script

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.send(404, "text/html", b"<html>no list of models here</html>")

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers.get("Authorization", "").removeprefix("Bearer ")
        name, *arguments = self.script.next({"path": self.path, "key": key, **body})
        getattr(self, "do_" + name)(body, key, *arguments)

    def send(self, status, kind, content, **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        with suppress(ConnectionError):  # who asked may have gone
            self.end_headers()
            self.wfile.write(content)

    def send_json(self, content, status=200, **headers):
        self.send(status, "application/json", json.dumps(content).encode(), **headers)

    def chat(self, text, **more):
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        choice["finish_reason"] = more.pop("finish_reason", "stop")
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        whole = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        self.send_json(whole | {"choices": [choice], "usage": usage} | more)

    def do_text(self, body, key, text):
        """A reply of these words; KEY in them is the key that came with the request."""
        self.chat(text.replace("KEY", key))

    def do_rate(self, body, key):
        """A rating that the prompt alone decides."""
        digest = hashlib.sha256(body["messages"][0]["content"].encode()).digest()
        self.chat(f"It is as it is.\nRating: [[{1 + digest[0] % 10}]]")

    def do_cut(self, body, key, text):
        self.chat(text, finish_reason="length")

    def do_slow(self, body, key, seconds, text):
        time.sleep(seconds)
        self.chat(text)

    def do_status(self, body, key, status, text):
        """A failure; clients are asked to try again at once."""
        content = {"error": {"message": text.replace("KEY", key)}}
        self.send_json(content, status, retry_after_ms="1")

    def do_page(self, body, key):
        self.send(200, "text/html", b"<html><body>Welcome</body></html>")

    def do_redirect(self, body, key, place):
        self.send(301, "text/html", b"", Location=place)

    def do_raw(self, body, key, content):
        """Something that claims to be JSON."""
        self.send(200, "application/json", content.encode())

    def do_json(self, body, key, content):
        self.send_json(content)

    def do_huge(self, body, key, size):
        self.send(200, "application/json", b'"' + b"x" * size + b'"')

    def do_hang_up(self, body, key):
        self.close_connection = True
