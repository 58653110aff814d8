"""What a request may say of its trace, and under which name the engine then keeps it.

vLLM gives a request an internal name, the response's id and eight random letters, and makes several of one where
several answers are asked for. The front end therefore writes the response's id into the request itself.
"""

from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

TRACE_FIELD = "eos_trace"


def check_trace(extra: dict[str, Any] | None, page: bool) -> bool:
    """Whether a request asks for a trace.

    Args:
        extra: its ``vllm_xargs``.
        page: whether the server has ``--eos-page``.

    Raises:
        VLLMValidationError: it is neither true nor false, or the server keeps no traces; answered as HTTP 400.
    """
    if not extra or TRACE_FIELD not in extra:
        return False
    value = extra[TRACE_FIELD]
    if not page:
        problem, remedy = "this server keeps no traces", "leave it out, or start the server with --eos-page"
    elif value not in (0, 1):  # vLLM's parser makes numbers of true and false
        problem, remedy = "it is neither true nor false", "give true, or leave it out"
    else:
        return bool(value)
    raise VLLMValidationError(
        f"vllm_xargs.{TRACE_FIELD}={value!r}: {problem}; {remedy}", parameter=TRACE_FIELD, value=value
    )


def write_name(request: Any, response_id: str) -> None:
    """Replaces the wish in a request that was checked by the id of its response; the parameters are the request's."""
    params = request.sampling_params
    extra = None if params is None else params.extra_args
    if not extra or TRACE_FIELD not in extra:
        return
    others = {key: value for key, value in extra.items() if key != TRACE_FIELD}
    params.extra_args = {**others, TRACE_FIELD: response_id} if extra[TRACE_FIELD] else others


def name_of(params: SamplingParams | None) -> str | None:
    """The id under which a request is traced, None where it is not; a front end that checks nothing writes none."""
    name = (params.extra_args or {}).get(TRACE_FIELD) if params is not None else None
    return name if isinstance(name, str) else None
