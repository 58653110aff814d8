"""A server as lmms-eval's counterpart sees it: models, counters, and one answer to everything."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def counters(images: float, kept: dict[int, float], engine: int = 0) -> str:
    """Lines of a server's ``/metrics``."""
    lines = [f'vllm:num_requests_running{{engine="{engine}"}} 0.0', "# TYPE eos_images_total counter"]
    lines.append(f'eos_images_total{{engine="{engine}"}} {images}')
    lines += [f'eos_visual_tokens_kept_total{{engine="{engine}",layer="{k}"}} {v}' for k, v in kept.items()]
    return "\n".join(lines) + "\n"


class FakeServer:
    """A server that keeps ``kept`` tokens after each layer of every image, as its counters say."""

    def __init__(self, kept: dict[int, int] | None, name: str = "eos") -> None:
        self.kept, self.name, self.images = kept, name, 0

    def text(self, path: str) -> str:
        """Body of ``GET path``."""
        if self.name == "page":
            return "<html></html>"
        if path == "/v1/models":
            return json.dumps({"data": [{"id": self.name}]})
        if self.kept is None:
            return "vllm:num_requests_running 0.0\n"
        if not self.kept:
            return ""
        return counters(self.images, {layer: self.images * count for layer, count in self.kept.items()})

    def answered(self, *_: str) -> None:
        """One more image."""
        self.images += 1


@contextmanager
def running(server: FakeServer) -> Iterator[str]:
    """The server's base URL while it listens."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self, body: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body.encode())

        def do_GET(self) -> None:
            self.reply(server.text(self.path))

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            server.answered()
            message = {"role": "assistant", "content": "yes"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "eos", "choices": [choice]}
            self.reply(json.dumps(reply))

        def log_message(self, *_: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}/v1"
    finally:
        listening.shutdown()
        listening.server_close()
