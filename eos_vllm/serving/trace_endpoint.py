"""``GET /eos/trace/{id}``: what was kept of a request that asked for it. Reading frees it."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from vllm.logger import init_logger

from eos_vllm.serving.trace_document import Outline, Record, Trace, build_trace
from eos_vllm.serving.trace_requests import TRACE_FIELD

logger = init_logger("vllm.eos")
router = APIRouter(prefix="/eos", tags=["eos"])


class Problem(BaseModel):
    """Why there is no answer."""

    error: str = Field(description="one line")


async def trace_of(client: Any, name: str) -> Trace | None:
    """Asks all engines for a request's trace.

    Args:
        client: the server's engine client.
        name: id of the response.

    Returns:
        None where none of them holds it.
    """
    answers = await client.engine_core.call_utility_all_async("eos_trace", name)
    for answer in answers:
        if answer is not None:
            records = [Record.model_validate(record) for record in answer["records"]]
            # Building takes milliseconds with large images, and other requests stream meanwhile.
            return await asyncio.to_thread(build_trace, Outline.model_validate(answer["outline"]), records)
    return None


@router.get(
    "/trace/{trace_id}",
    response_model=Trace,
    responses={
        401: {"model": Problem, "description": "the server has an API key, and this is another"},
        404: {"model": Problem, "description": "nothing is held: never traced, not at its end, read, or displaced"},
        503: {"model": Problem, "description": "the engines do not answer"},
    },
)
async def trace(request: Request, trace_id: str) -> Any:
    """What each reducer kept of a request's images, by the id of its response; once."""
    state = request.app.state
    if state.eos_guard is not None and not state.eos_guard.verify_token(request.headers):
        return JSONResponse({"error": "Unauthorized"}, status_code=401)
    try:
        found = await trace_of(state.eos_client, trace_id)
    except Exception as e:
        logger.exception("eos: a trace could not be read")
        return JSONResponse({"error": f"the trace could not be read: {type(e).__name__}"}, status_code=503)
    if found is None:
        problem = f'no trace is held under this id; ask with vllm_xargs: {{"{TRACE_FIELD}": true}}, and read it once'
        return JSONResponse({"error": problem}, status_code=404)
    return JSONResponse(found.model_dump(), headers={"Cache-Control": "no-store"})
