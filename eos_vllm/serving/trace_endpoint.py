"""``GET /eos/trace/{id}``: what was kept of a request that asked for it. Reading frees it."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, Field
from vllm.logger import init_logger

from eos_vllm.serving.trace_document import Outline, Record, Trace, build_trace
from eos_vllm.serving.trace_requests import TRACE_FIELD

logger = init_logger("vllm.eos")
router = APIRouter(prefix="/eos", tags=["eos"])


class Problem(BaseModel):
    """Why there is no answer."""

    error: str = Field(description="one line")


async def trace_of(client: Any, name: str) -> bytes | None:
    """Asks all engines for a request's trace.

    Args:
        client: the server's engine client.
        name: id of the response.

    Returns:
        The document as JSON, None where none of them holds it.
    """
    answers = await client.engine_core.call_utility_all_async("eos_trace", name)
    for answer in answers:
        if answer is not None:
            # It takes milliseconds with large images, and other requests stream meanwhile.
            return await asyncio.to_thread(document, answer)
    return None


def document(answer: dict[str, Any]) -> bytes:
    """The trace of what an engine and its workers sent, as JSON.

    Raises:
        RuntimeError: as :func:`build_trace`.
    """
    records = [Record.model_validate(record) for record in answer["records"]]
    return build_trace(Outline.model_validate(answer["outline"]), records).model_dump_json().encode()


@router.get(
    "/trace/{trace_id}",
    response_model=Trace,
    responses={
        404: {"model": Problem, "description": "nothing is held: never traced, not at its end, read, or displaced"},
        503: {"model": Problem, "description": "the engines do not answer"},
    },
)
async def trace(request: Request, trace_id: str) -> Any:
    """What each reducer kept of a request's images, by the id of its response; once."""
    try:
        found = await trace_of(request.app.state.eos_client, trace_id)
    except Exception as e:
        logger.exception("eos: a trace could not be read")
        return JSONResponse({"error": f"the trace could not be read: {type(e).__name__}"}, status_code=503)
    if found is None:
        problem = f'no trace is held under this id; ask with vllm_xargs: {{"{TRACE_FIELD}": true}}, and read it once'
        return JSONResponse({"error": problem}, status_code=404)
    return Response(found, media_type="application/json", headers={"Cache-Control": "no-store"})
