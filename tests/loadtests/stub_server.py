"""A stand-in for an OpenAI-compatible server: streams known tokens at known moments, fails where it is told to."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROMPT_TOKENS = 600


class StubServer(ThreadingHTTPServer):
    """Answers chat completions; ``bodies`` keeps what was asked, in the order of arrival.

    What the question begins with decides what happens: ``reject`` 400, ``crash`` 500, ``short`` fewer tokens than asked
    for, ``cut`` a stream that ends early, ``late error`` an error within the stream, ``drop`` a connection that breaks;
    anything else is answered with "yes" and blanks, as many tokens as asked for. The next ``unhealthy`` looks at
    ``/health`` are refused. ``stale`` requests run by the gauge until the next answer, as after vLLM's last abort.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, pause: float) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pause = pause
        self.unhealthy = self.stale = 0
        self.bodies: list[dict[str, Any]] = []
        self.running = self.most_running = self.answered = self.tokens = self.disconnects = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def metrics(self) -> str:
        """The page of Prometheus' text form, as far as load tests read it."""
        return (
            "# TYPE vllm:num_requests_running gauge\n"
            f'vllm:num_requests_running{{engine="0"}} {self.running + self.stale}\n'
            "# TYPE vllm:num_requests_waiting gauge\n"
            'vllm:num_requests_waiting{engine="0"} 0\n'
            "# TYPE eos_kv_blocks_held gauge\n"
            f'eos_kv_blocks_held{{engine="0",segment="0"}} {3 * self.running}\n'
            "# TYPE vllm:kv_cache_usage_perc gauge\n"
            f'vllm:kv_cache_usage_perc{{engine="0"}} {self.running / 100}\n'
            "# TYPE vllm:request_success counter\n"
            f'vllm:request_success_total{{finished_reason="length"}} {self.answered}\n'
            'vllm:request_success_total{finished_reason="abort"} 7\n'
            "# TYPE vllm:generation_tokens counter\n"
            f'vllm:generation_tokens_total{{engine="0"}} {self.tokens}\n'
            "# TYPE vllm:prompt_tokens counter\n"
            f'vllm:prompt_tokens_total{{engine="0"}} {PROMPT_TOKENS * self.answered}\n'
            "# TYPE vllm:cache_config_info gauge\n"
            'vllm:cache_config_info{num_gpu_blocks="101"} 1.0\n'
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Or small pieces would wait for the acknowledgement of the one before.
    disable_nagle_algorithm = True
    server: StubServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle(self) -> None:
        # Clients may end a connection that they keep however they like.
        with suppress(ConnectionResetError):
            super().handle()

    def do_GET(self) -> None:
        if self.path == "/health" and self.server.unhealthy:
            self.server.unhealthy -= 1
            self._whole(503, b"")
            return
        self._whole(200, self.server.metrics().encode())

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        try:
            body = json.loads(raw)
            question = text_of(body["messages"][-1])
        except (ValueError, KeyError):
            self._whole(400, json.dumps({"error": {"message": "no request"}}).encode())
            return
        self.server.bodies.append(body)
        if question.startswith("reject") or "many" in str(body.get("vllm_xargs")) or len(question) > 100_000:
            self._whole(400, json.dumps({"error": {"message": "eos_retain: no budget"}}).encode())
        elif body["model"] == "no-such-model":
            self._whole(404, json.dumps({"error": {"message": "no such model"}}).encode())
        elif "bm8gaW1hZ2U=" in str(body["messages"]):
            self._whole(400, json.dumps({"error": {"message": "no image"}}).encode())
        elif question.startswith("crash"):
            self._whole(500, b"oops")
        else:
            self._answer(body, question)

    def _answer(self, body: dict[str, Any], question: str) -> None:
        server = self.server
        with server.lock:
            server.running += 1
            server.most_running = max(server.running, server.most_running)
        try:
            self._stream(body, question)
        except (BrokenPipeError, ConnectionResetError):
            server.disconnects += 1
            self.close_connection = True
        finally:
            with server.lock:
                server.running -= 1

    def _whole(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, body: dict[str, Any], question: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        tokens = (body.get("max_tokens") or body["max_completion_tokens"]) - question.startswith("short")
        self._event(choices=[{"delta": {"role": "assistant", "content": ""}}])
        for i in range(tokens):
            time.sleep(self.server.pause)
            last = i == tokens - 1
            word = "yes" if i == 0 else " "
            self._event(choices=[{"delta": {"content": word}, "finish_reason": "length" if last else None}])
            if question.startswith("cut") and i == 1:
                self.wfile.write(b"0\r\n\r\n")
                return
            if question.startswith("drop") and i == 1:
                self.close_connection = True
                return
            if question.startswith("late error") and i == 1:
                self._event(error={"message": "engine died"})
                self.wfile.write(b"0\r\n\r\n")
                return
        with self.server.lock:
            self.server.answered += 1
            self.server.stale = 0
            self.server.tokens += tokens
        self._event(choices=[], usage={"prompt_tokens": PROMPT_TOKENS, "completion_tokens": tokens})
        self._piece(b"data: [DONE]\n\n")
        self.wfile.write(b"0\r\n\r\n")

    def _event(self, **chunk: Any) -> None:
        self._piece(f"data: {json.dumps(chunk)}\n\n".encode())

    def _piece(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


def text_of(message: dict[str, Any]) -> str:
    """The text of a chat message."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return next((part["text"] for part in content if part["type"] == "text"), "")


@contextmanager
def stub_server(pause: float = 0.001) -> Iterator[StubServer]:
    """Runs the stand-in in a thread; ``pause`` seconds before each token."""
    server = StubServer(pause)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
