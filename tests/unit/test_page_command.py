"""``eos-vllm page`` without a model: where it listens and waits, what it refuses, and what it says at the end."""

import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eos_vllm.cli import page as page_command
from eos_vllm.cli import server_process
from eos_vllm.cli.main import main
from eos_vllm.cli.page import address, embedded_flags
from eos_vllm.cli.server_process import url_of


def test_the_command_says_where_the_page_is_and_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["page", "--base-url", "nowhere"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eos-vllm: error: base-url='nowhere'")
    assert address("0.0.0.0", 8600) == "http://127.0.0.1:8600/eos/"
    assert address("::1", 80) == "http://[::1]:80/eos/"
    assert "--eos-page" in embedded_flags("embedded-fastv")


@pytest.mark.parametrize(
    ("host", "url"),
    [("", "http://127.0.0.1:80"), ("0.0.0.0", "http://127.0.0.1:80"), ("::", "http://[::1]:80"), ("h", "http://h:80")],
)
def test_a_server_is_asked_where_it_listens(host: str, url: str) -> None:
    assert url_of(host, 80) == url


def test_a_server_that_listens_elsewhere_is_waited_for_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an address that the usual one does not reach."""
    program = "import sys, http.server as h\n"
    program += (
        "class Healthy(h.BaseHTTPRequestHandler):\n  def do_GET(self): self.send_response(200); self.end_headers()\n"
    )
    program += "named = dict(zip(sys.argv, sys.argv[1:]))\n"
    program += "h.HTTPServer((named['--host'], int(named['--port'])), Healthy).serve_forever()"
    monkeypatch.setattr(server_process, "vllm_command", lambda *rest: [sys.executable, "-c", program, *rest])
    monkeypatch.setattr(server_process, "START_SECONDS", 10)
    with server_process.serve("model", [], tmp_path / "log", host="127.0.0.2") as server:
        assert server.url.startswith("http://127.0.0.2:")
        assert server.text("/health") == ""


@pytest.mark.parametrize("more", [[], ["--base-url", "http://127.0.0.1:1"]])
def test_a_port_that_is_taken_is_one_line(
    more: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(page_command, "serve", started)
    monkeypatch.setattr("uvicorn.run", started)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["page", "--port", str(port), *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"eos-vllm: error: port={port}")
    for wrong, named in (
        (["--port", "0"], "port=0"),
        (["--port", "99999"], "port=99999"),
        (["--host", "192.0.2.1"], "host='192.0.2.1'"),
    ):
        assert main(["page", *wrong, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"eos-vllm: error: {named}")


def test_the_end_of_a_log_is_shown_before_it_goes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def served(*args: Any) -> Iterator[Any]:
        args[2].write_text("starting\nout of memory\n")
        yield SimpleNamespace(process=SimpleNamespace(wait=lambda: 1))

    monkeypatch.setattr(page_command, "serve", served)
    monkeypatch.setattr("signal.signal", lambda *args: None)
    assert main(["page", "--port", str(server_process.free_port())]) == 1
    assert capsys.readouterr().out.endswith("the server ended by itself:\nstarting\nout of memory\n")
