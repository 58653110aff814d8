"""``POST /eos/plan`` and ``GET /eos/choices``: what budgets cost, and what measured ones are worth.

Pure: nothing here asks an engine. The app that mounts :data:`router` puts a :class:`PlanContext` into
``app.state.eos_plan`` and, where it has API keys, a guard into ``app.state.eos_guard``, as ``GET /eos/status`` has it.
Input is bounded: a body of at most :data:`MOST_BYTES`, so many budgets, numbers within ranges. A mistake is a 400 whose
``error`` is one line with field, value and remedy.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError

from eos_vllm.analysis.advise import Catalogue, Wish
from eos_vllm.analysis.choices import Choices, Point, acts, choices
from eos_vllm.analysis.comparison import compare, held_reduced, held_stock
from eos_vllm.analysis.cost import Geometry, PromptCost
from eos_vllm.core.budget import RetainBudget, kept_counts, parse_budget, plain
from eos_vllm.core.errors import EosError, SettingError
from eos_vllm.core.plan import Planner
from eos_vllm.page.plan_documents import (
    AdviceQuery,
    BudgetPlan,
    ChoicesAnswer,
    Cost,
    PlanRequest,
    Plans,
    PlanSegment,
    ServedPoint,
)

MOST_BYTES, MOST_PIXELS = 1 << 14, 1 << 16
router = APIRouter(prefix="/eos", tags=["eos"])
_Model = TypeVar("_Model", bound=BaseModel)


@dataclass
class PlanContext:
    """What the routes plan with.

    Attributes:
        planner: the server's; only its profile, budget, rounding and example are taken.
        geometry: sizes of the model.
        model: its name; ``embedded`` where it is the model that was measured.
        dtype: of the KV cache.
        block_size: tokens per KV block.
        size_tokens: visual tokens of an image of a width and height, where images have any number; None: not known.
    """

    planner: Planner
    geometry: Geometry
    model: str
    dtype: str = "float16"
    block_size: int = 16
    size_tokens: Callable[[int, int], int] | None = None
    measured: Choices = field(default_factory=choices)

    def planner_for(self, visual_tokens: int | None, size: tuple[int, int] | None) -> Planner:
        """A planner of its own, so that no request fills the server's memory of budgets.

        Raises:
            SettingError: tokens of an image that has another number, both, or a size that nobody can count.
        """
        profile = self.planner.profile
        if visual_tokens is not None and size is not None:
            raise SettingError("size", list(size), "visual_tokens says it already", "leave one of them out")
        if size is not None and not all(0 < pixels <= MOST_PIXELS for pixels in size):
            raise SettingError("size", list(size), "no image is of that size", f"give 1 to {MOST_PIXELS} pixels")
        if (fixed := profile.model.visual_tokens) is not None:
            if visual_tokens not in (None, fixed):
                problem = f"each image has {fixed} visual tokens, whatever its size"
                raise SettingError("visual_tokens", visual_tokens, problem, "leave it out")
            example: int | None = fixed
        elif size is not None:
            if self.size_tokens is None:
                raise SettingError("size", list(size), "its tokens are not known here", "give visual_tokens")
            example = self.size_tokens(*size)
        else:
            example = self.planner.example if visual_tokens is None else visual_tokens
        return Planner(profile, self.planner.budget, self.planner.block, example=example)

    @cached_property
    def catalogue(self) -> Catalogue:
        """The measured points, planned for this model. Raises as :class:`Catalogue`."""
        return Catalogue(self.measured, self.geometry, self.model, self.dtype, self.block_size)

    @cached_property
    def points(self) -> list[ServedPoint]:
        """The measured points, each with whether this server can be asked for it."""
        ours, fits = acts(self.planner.profile), self.geometry.visual_tokens == self.measured.visual_tokens
        same = {
            does: fits and acts(self.measured.profile(point)) == ours
            for does, point in {point.does: point for point in self.measured.points}.items()
        }
        return [
            ServedPoint(**point.model_dump(), served_here=same[point.does] and self._means_the_same(point))
            for point in self.measured.points
        ]

    def _means_the_same(self, point: Point) -> bool:
        profile = self.planner.profile
        if profile.budget.measure != point.measure:
            return False
        try:
            return kept_counts(profile, point.budget) == point.counts
        except EosError:
            return False


def plan(context: PlanContext, wanted: PlanRequest) -> Plans:
    """Plans each budget.

    Raises:
        EosError: a budget or an image that cannot be planned.
    """
    planner = context.planner_for(wanted.visual_tokens, wanted.size)
    budgets = [None if value is None else parse_budget(value, "budgets") for value in wanted.budgets]
    found = [_plan_one(context, planner, wanted, budget) for budget in budgets]
    return Plans(
        profile=planner.profile.name,
        measure=planner.profile.budget.measure,
        visual_tokens=planner.visual_tokens,
        block_size=context.block_size,
        dtype=context.dtype,
        stock=found[0][1],
        plans=[plan for plan, _ in found],
    )


def _plan_one(
    context: PlanContext, planner: Planner, wanted: PlanRequest, budget: RetainBudget | None
) -> tuple[BudgetPlan, Cost]:
    kind = (context.dtype, context.block_size)
    prompt = compare(context.geometry, planner, wanted.text_tokens, wanted.images, budget, *kind)
    text = (wanted.text_tokens, wanted.output_tokens, wanted.images)
    held = held_reduced(context.geometry, planner, *text, budget, *kind)
    stock = held_stock(context.geometry, planner.visual_tokens, *text, *kind)
    mine = BudgetPlan(
        **_cost(held, prompt.reduced).model_dump(),
        budget=plain(planner.budget if budget is None else budget),
        counts=list(prompt.counts),
        layers=[-1] * (planner.profile.before is not None) + list(planner.profile.layers),
        layer_average=prompt.layer_average,
        final=prompt.final,
        kv_share=prompt.visual_kv_ratio,
        held_share=held.allocated_bytes / stock.allocated_bytes,
        flops_share=prompt.flops_ratio,
        segments=[
            PlanSegment(layer_from=s.first_layer, layers=s.layers, tokens=s.tokens, kv_blocks=s.blocks)
            for s in held.segments
        ],
    )
    return mine, _cost(stock, prompt.stock)


def _cost(held: PromptCost, prompt: PromptCost) -> Cost:
    return Cost(
        tokens=held.layer_tokens[0],
        layer_tokens=list(held.layer_tokens),
        kv_blocks=held.blocks,
        kv_bytes=held.allocated_bytes,
        prefill_flops=prompt.flops,
    )


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
