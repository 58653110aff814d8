"""What the page ``/eos/`` needs of a server: its static files, which anybody may read, and samples behind the API key.

The same files serve in a vLLM server (``--eos-page``) and in front of any other (:mod:`eos_vllm.page.proxy`).
"""

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi import Path as InPath
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, Field
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from eos_vllm.cluttervqa import make_sample
from eos_vllm.models.images import to_data_url

STATIC = Path(__file__).parent / "static"
# Samples are drawn on demand; a bound keeps the path's numbers readable, not the work.
MOST_SAMPLES = 100_000
# Text from models and users can't become script even if it got into the document: only the page's own files run.
# Images are the user's (data:, blob:), and a picture drawn on a canvas is neither.
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Files have no version in their names: browsers ask each time, and are told that nothing changed.
    "Cache-Control": "no-cache",
}
# With "nosniff" a wrong type is a blank page, and Python takes some of them from the machine.
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".txt": "text/plain"}


class SampleQuestion(BaseModel):
    """A question whose answer is known."""

    text: str
    answer: str
    kind: str = Field(description="what it asks for: presence, attribute, counting, relation, reading, choice")


class PageSample(BaseModel):
    """An image of ClutterVQA's test split, which the embedded model was not trained on."""

    number: int
    image: str = Field(description="data: URL of a PNG, 96 by 96 pixels")
    questions: list[SampleQuestion]


class PageFiles(StaticFiles):
    """The page's files, with headers of their own."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        if (kind := TYPES.get(Path(path).suffix)) is not None and response.status_code == 200:
            response.headers["Content-Type"] = f"{kind}; charset=utf-8"
        return response


def check_key(request: Request) -> None:
    """Lets through who has the server's API key, as ``GET /eos/status`` does; everybody where it has none.

    Raises:
        HTTPException: 401.
    """
    guard = getattr(request.app.state, "eos_guard", None)
    if guard is not None and not guard.verify_token(request.headers):
        raise HTTPException(401, "Unauthorized")


GUARD = Depends(check_key)
UNAUTHORIZED: dict[int | str, dict[str, Any]] = {401: {"description": "the server has an API key, this is another"}}
router = APIRouter(prefix="/eos", tags=["eos page"])


@router.get("/", include_in_schema=False)
def page() -> FileResponse:
    """The page itself: no secret, for a browser can't send a key with it."""
    return FileResponse(STATIC / "index.html", headers=HEADERS)


@router.get("/samples/{number}", dependencies=[GUARD], responses=UNAUTHORIZED)
def sample(number: Annotated[int, InPath(ge=0, lt=MOST_SAMPLES)]) -> PageSample:
    """A ClutterVQA sample, with questions and their answers."""
    drawn = make_sample("test", number)
    questions = [SampleQuestion(text=q.text, answer=q.answer, kind=q.kind) for q in drawn.questions]
    return PageSample(number=number, image=to_data_url(drawn.image), questions=questions)


def add_page(app: FastAPI, *routers: APIRouter) -> None:
    """Adds the page and its samples, and further routers of it, each behind the key.

    Args:
        app: the server's; ``app.state.eos_guard`` is the guard of its keys, or None.
        routers: with paths of their own below ``/eos``.
    """
    app.include_router(router)
    for further in routers:
        app.include_router(further, dependencies=[GUARD], responses=UNAUTHORIZED)
    app.mount("/eos/static", PageFiles(directory=STATIC), name="eos-page")
