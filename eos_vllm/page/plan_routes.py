"""``POST /eos/plan`` and ``GET /eos/choices``: what budgets cost, and what measured ones are worth.

Pure: nothing here asks an engine. The app that mounts :data:`router` puts a :class:`PlanContext` into
``app.state.eos_plan`` and, where it has API keys, a guard into ``app.state.eos_guard``, as ``GET /eos/status`` has it.
Input is bounded: a body of at most :data:`MOST_BYTES`, so many budgets, numbers within ranges. A mistake is a 400 whose
``error`` is one line with field, value and remedy.
"""

import json
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from eos_vllm.analysis.advice import Wish
from eos_vllm.core.errors import EosError, SettingError
from eos_vllm.page.plan import PlanContext, plan
from eos_vllm.page.plan_documents import AdviceQuery, ChoicesAnswer, PlanRequest, Plans

MOST_BYTES = 1 << 14
router = APIRouter(prefix="/eos", tags=["eos"])
_Model = TypeVar("_Model", bound=BaseModel)


def answer_choices(context: PlanContext, query: dict[str, str]) -> ChoicesAnswer:
    """The measured points, and where ``query`` asks for one, a recommendation among them.

    Raises:
        EosError: a parameter that is missing or wrong.
    """
    measured, advice = context.measured, None
    if query:
        asked = _parse(AdviceQuery, query)
        names = () if asked.profile == "all" else tuple(name.strip() for name in asked.profile.split(","))
        wish = Wish(
            **asked.model_dump(include={"kv_gib", "concurrency", "accuracy_floor", "images", "by"}),
            text_tokens=asked.prompt,
            output_tokens=asked.output,
            profiles=names,
        )
        advice = context.catalogue.advise(wish)
    plain_data = measured.model_dump(include={"model", "source", "visual_tokens", "origin", "baselines", "load_tests"})
    return ChoicesAnswer(**plain_data, points=context.points, recommendation=advice)


def _parse(model: type[_Model], data: bytes | dict[str, str]) -> _Model:
    """Input as a model.

    Raises:
        SettingError: the first of its mistakes.
    """
    try:
        return model.model_validate_json(data) if isinstance(data, bytes) else model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"][:2]) or "body"
        remedy = f"give {', '.join(model.model_fields)} as the OpenAPI schema says"
        raise SettingError(place, first["input"], first["msg"], remedy) from None


async def _body(request: Request) -> bytes:
    """The request's body, never more than :data:`MOST_BYTES` of it.

    Raises:
        SettingError: it is longer.
    """
    found = b""
    async for part in request.stream():
        found += part
        if len(found) > MOST_BYTES:
            problem = f"it is longer than {MOST_BYTES} bytes"
            raise SettingError("body", f"{len(found)} bytes", problem, "send the fields of a plan and nothing else")
    return found


def _refused(request: Request) -> JSONResponse | None:
    """The 401 of a request without the server's API key, as ``GET /eos/status`` gives it."""
    guard = getattr(request.app.state, "eos_guard", None)
    if guard is None or guard.verify_token(request.headers):
        return None
    return JSONResponse({"error": "Unauthorized"}, status_code=401)


def _json(found: BaseModel) -> JSONResponse:
    return JSONResponse(json.loads(found.model_dump_json()), headers={"Cache-Control": "no-store"})


_ERROR = {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"description": "one line: field, value, remedy", "content": {"application/json": {"schema": _ERROR}}},
    401: {"description": "the server has an API key, and this is another"},
}
_PLAN_BODY = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": PlanRequest.model_json_schema()}}}
}
_QUERY = {
    "parameters": [
        {"in": "query", "name": name, "schema": schema, "required": False}
        for name, schema in AdviceQuery.model_json_schema()["properties"].items()
    ]
}


@router.post("/plan", response_model=Plans, responses=_RESPONSES, openapi_extra=_PLAN_BODY)
async def post_plan(request: Request) -> Any:
    """What a prompt costs at each budget, and in stock: the figures of ``eos-vllm plan``."""
    if (refused := _refused(request)) is not None:
        return refused
    try:
        wanted = _parse(PlanRequest, await _body(request))
        return _json(await run_in_threadpool(plan, request.app.state.eos_plan, wanted))
    except EosError as error:
        return JSONResponse({"error": str(error)}, status_code=400)


@router.get("/choices", response_model=ChoicesAnswer, responses=_RESPONSES, openapi_extra=_QUERY)
async def get_choices(request: Request) -> Any:
    """Measured accuracy against cost, and with parameters the choice that ``eos-vllm advise`` makes."""
    if (refused := _refused(request)) is not None:
        return refused
    try:
        query = dict(request.query_params)
        return _json(await run_in_threadpool(answer_choices, request.app.state.eos_plan, query))
    except EosError as error:
        return JSONResponse({"error": str(error)}, status_code=400)
