"""The page without a browser or an engine: its files, headers, samples, the key, and the page before another server."""

import asyncio
import base64
import concurrent.futures
import hashlib
import io
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.testclient import TestClient
from page_browser import STATIC, run_modules
from PIL import Image

from eos_vllm.cluttervqa import make_sample
from eos_vllm.core.errors import SettingError
from eos_vllm.page.proxy import MOST_BYTES, check_base_url, page_app
from eos_vllm.page.routes import add_page

VENDOR = STATIC / "vendor"
KEY = {"Authorization": "Bearer right"}


class Guard:
    """As vLLM's: takes one key."""

    def verify_token(self, headers: Any) -> bool:
        return headers.get("Authorization") == "Bearer right"


@pytest.fixture
def client() -> TestClient:
    app, more = FastAPI(), APIRouter(prefix="/eos")
    more.add_api_route("/more", lambda: {"secret": 1}, methods=["GET"])
    app.state.eos_guard = Guard()
    add_page(app, more)
    return TestClient(app)


def test_modules_in_node() -> None:
    done = run_modules()
    assert done.returncode == 0, done.stdout
    # Of Node's two reports, the one for a terminal and TAP. No test at all would be a success, too.
    assert re.search(r"^\S tests [1-9]\d*$", done.stdout, re.MULTILINE), done.stdout


def test_anybody_gets_the_page_and_its_files(client: TestClient) -> None:
    page = client.get("/eos/")
    assert page.status_code == 200
    for name in re.findall(r'(?:src|href)="(static/[^"]+)"', page.text):
        file = client.get(f"/eos/{name}")
        assert file.status_code == 200, name
        assert file.headers["x-content-type-options"] == "nosniff"
    assert client.get("/eos/static/js/main.js").headers["content-type"] == "text/javascript; charset=utf-8"
    assert client.get("/eos/static/base.css").headers["content-type"] == "text/css; charset=utf-8"
    assert client.get("/eos", follow_redirects=False).status_code in (200, 307)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/eos/static/js/main.js", 200),  # so that the way here is known to reach files
        ("/eos/static/js/../base.css", 200),
        ("/eos/static/../routes.py", 404),
        ("/eos/static/js/../../routes.py", 404),
        (f"/eos/static/{STATIC.parent / 'routes.py'}", 404),
    ],
)
def test_files_outside_are_out_of_reach(client: TestClient, path: str, status: int) -> None:
    """By the raw path that a server hands to the application: clients take the dots out before they send it."""
    sent: list[Any] = []
    scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "query_string": b"", "headers": []}

    async def receive() -> Any:
        await asyncio.Event().wait()  # a client that stays, and has sent all

    async def send(message: Any) -> None:
        sent.append(message)

    asked: Any = client.app({**scope, "raw_path": path.encode()}, receive, send)  # type: ignore[arg-type]
    # In a thread of its own, for the browser's loop may be running in this one.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(asyncio.run, asked).result()
    assert (STATIC / path.removeprefix("/eos/static/")).exists()
    assert sent[0]["status"] == status


def test_only_its_own_files_may_run(client: TestClient) -> None:
    page = client.get("/eos/")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert "unsafe" not in page.headers["content-security-policy"]
    # What such a policy forbids must not be there either: a browser would drop it without a word.
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=", page.text)
    assert not re.search(r"https?://", page.text)


def test_text_never_becomes_markup() -> None:
    ways = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|setTimeout\(\s*[\"'`]"
    )
    files = sorted((STATIC / "js").glob("*.js"))
    assert len(files) > 10
    assert [file.name for file in files if ways.search(file.read_text(encoding="utf-8"))] == []


def test_vendored_files_are_those_that_are_named() -> None:
    named = re.findall(r"\| `([^`]+)` \| `[^`]+` \| `([0-9a-f]{64})` \|", (VENDOR / "README.md").read_text())
    assert len(named) == 3
    for name, digest in named:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == digest, name
    assert {file.name for file in VENDOR.iterdir()} == {"README.md", *(name for name, _ in named)}
    assert "MIT License" in (VENDOR / "uPlot.LICENSE.txt").read_text()


def test_the_key_guards_all_but_the_files(client: TestClient) -> None:
    for path in ("/eos/samples/0", "/eos/more"):
        assert (client.get(path).status_code, client.get(path).json()) == (401, {"error": "Unauthorized"})
        assert client.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert client.get(path, headers=KEY).status_code == 200


def test_samples(client: TestClient) -> None:
    found = client.get("/eos/samples/7", headers=KEY).json()
    sample = make_sample("test", 7)
    head, data = found["image"].split(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == sample.image.tobytes()
    assert [(q["text"], q["answer"], q["kind"]) for q in found["questions"]] == [
        (q.text, q.answer, q.kind) for q in sample.questions
    ]
    for bad in ("-1", "100000", "x", "1.5", "9" * 400):
        assert client.get(f"/eos/samples/{bad}", headers=KEY).status_code == 422, bad


# The page before another server.


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("https://host/prefix/v1/", "https://host/prefix"),
        ("http://[::1]:80/v1", "http://[::1]:80"),
    ],
)
def test_addresses(given: str, base: str) -> None:
    assert check_base_url(given) == base


@pytest.mark.parametrize("given", ["", "host:8000", "ftp://host", "http://", "http://user:pw@host", "http://h:99999"])
def test_what_is_no_address(given: str) -> None:
    with pytest.raises(SettingError, match="base-url"):
        check_base_url(given)


@pytest.fixture
def upstream() -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    def models() -> Any:
        return {"data": [{"id": "elsewhere"}]}

    @app.post("/v1/chat/completions")
    async def chat(body: dict[str, Any]) -> Any:
        if "stream" not in body:
            return JSONResponse({"error": {"message": "no image"}}, 400)
        return StreamingResponse(iter([b"data: 1\n\n", b"data: [DONE]\n\n"]), media_type="text/event-stream")

    @app.post("/v1/load_lora_adapter")
    def change() -> Any:
        return {}

    return app


@pytest.fixture
def before(upstream: FastAPI) -> Iterator[TestClient]:
    with TestClient(page_app("http://elsewhere:8000/v1", httpx.ASGITransport(upstream))) as client:
        yield client


def test_it_passes_on_what_the_page_asks_for(before: TestClient) -> None:
    assert before.get("/").url.path == "/eos/"
    assert before.get("/v1/models").json()["data"][0]["id"] == "elsewhere"
    stream = before.post("/v1/chat/completions", json={"stream": True})
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.text == "data: 1\n\ndata: [DONE]\n\n"
    refused = before.post("/v1/chat/completions", json={})
    assert (refused.status_code, refused.json()) == (400, {"error": {"message": "no image"}})
    assert before.get("/eos/status").status_code == 404
    assert before.get("/eos/samples/0").status_code == 200


def test_it_passes_on_nothing_that_changes_a_server(before: TestClient) -> None:
    assert before.post("/v1/load_lora_adapter", json={}).status_code == 404
    assert before.post("/v1/models", json={}).status_code == 405
    assert before.get("/openapi.json").json()["paths"].keys().isdisjoint({"/v1/load_lora_adapter", "/{path}"})


def test_an_answer_that_breaks_off_does_not_look_complete() -> None:
    class Broken(httpx.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"
            raise httpx.ReadError("reset")

    broken = httpx.MockTransport(lambda request: httpx.Response(200, stream=Broken()))
    with TestClient(page_app("http://elsewhere", broken)) as client, pytest.raises(httpx.ReadError, match="reset"):
        client.post("/v1/chat/completions", json={"stream": True})


def test_a_request_that_is_too_large_and_a_server_that_is_not_there(before: TestClient) -> None:
    large = before.post("/v1/chat/completions", content=b"x" * (MOST_BYTES + 1))
    assert (large.status_code, large.json()["error"]) == (413, "the request is larger than 32 MiB")

    def nobody(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused", request=request)

    with TestClient(page_app("http://nowhere", httpx.MockTransport(nobody))) as client:
        gone = client.get("/v1/models")
    assert (gone.status_code, gone.json()["error"]) == (502, "http://nowhere does not answer (ConnectError)")
