"""The page in front of a server elsewhere: ``eos-vllm page --base-url URL``.

A browser lets a page talk to its own origin only, so this one passes on what the page asks for, and nothing else: no
path by which a server could be changed. Where the server has no ``/eos/`` paths (stock vLLM, or any OpenAI server) its
404 comes through, and the page shows what can be known without them.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.background import BackgroundTask

from eos_vllm.core.errors import SettingError
from eos_vllm.page.routes import add_page

# A page's image is 10 MiB at most, 13.4 in base64; chats repeat it once.
MOST_BYTES = 32 << 20
CONNECT_SECONDS = 5.0
# Hop-by-hop headers are each connection's own; the address and the length are the client's business.
_PASSED = ("authorization", "content-type", "accept")
_RETURNED = ("content-type", "cache-control", "www-authenticate", "retry-after")
_GET = ("/v1/models", "/metrics", "/health", "/eos/status", "/eos/choices", "/eos/trace/{id}")
_POST = ("/v1/chat/completions", "/eos/plan")


def check_base_url(url: str) -> str:
    """The address of a server, without what stands behind its host and path prefix.

    Raises:
        SettingError: it is no http or https URL with a host.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
        raise SettingError("base-url", url, "it is no address of a server", "give e.g. http://127.0.0.1:8000")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = parts.path.rstrip("/").removesuffix("/v1")
    return f"{parts.scheme}://{host}{f':{port}' if port else ''}{path}"


def page_app(base_url: str, transport: Any = None) -> FastAPI:
    """The page's own application.

    Args:
        base_url: of the server, with or without ``/v1``.
        transport: of httpx, for tests.

    Raises:
        SettingError: as :func:`check_base_url`.
    """
    base = check_base_url(base_url)
    # An answer may take as long as it likes; only a server that isn't there is told at once.
    limits = httpx.Timeout(None, connect=CONNECT_SECONDS)
    client = httpx.AsyncClient(timeout=limits, transport=transport, follow_redirects=False)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await client.aclose()

    app = FastAPI(title="eos-vllm page", lifespan=lifespan)
    app.state.eos_guard = None  # the key is the server's affair, and is passed on

    async def forward(request: Request) -> Response:
        body = await _body(request)
        if body is None:
            return JSONResponse({"error": f"the request is larger than {MOST_BYTES >> 20} MiB"}, 413)
        headers = {name: request.headers[name] for name in _PASSED if name in request.headers}
        url = httpx.URL(f"{base}{request.url.path}", query=request.url.query.encode())
        try:
            asked = client.build_request(request.method, url, headers=headers, content=body)
            answer = await client.send(asked, stream=True)
        except httpx.HTTPError as error:
            return JSONResponse({"error": f"{base} does not answer ({type(error).__name__})"}, 502)
        kept = {name: answer.headers[name] for name in _RETURNED if name in answer.headers}
        return StreamingResponse(_chunks(answer), answer.status_code, kept, background=BackgroundTask(answer.aclose))

    for path in _GET:
        app.add_api_route(path, forward, methods=["GET"], response_model=None)
    for path in _POST:
        app.add_api_route(path, forward, methods=["POST"], response_model=None)
    app.add_api_route("/", lambda: RedirectResponse("/eos/"), methods=["GET"], include_in_schema=False)
    add_page(app)
    return app


async def _body(request: Request) -> bytes | None:
    """The request's body, None where it is longer than :data:`MOST_BYTES`."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MOST_BYTES:
            return None
    return bytes(body)


async def _chunks(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The answer as it comes; one that breaks off ends there, for its status has been sent."""
    try:
        async for chunk in answer.aiter_bytes():
            yield chunk
    except httpx.HTTPError:
        return
