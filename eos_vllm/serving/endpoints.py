"""``GET /eos/status`` in the very server: whether the reduction is in place, in every worker of every engine.

An endpoint plugin of vLLM's kind. It is not registered as an entry point: vLLM loads such plugins only where
``VLLM_PLUGINS`` names them, and warns in every server, with a profile or without, where that variable is not set. The
flag ``--eos-profile`` is what asks for this one.
"""

import asyncio
import functools
import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from vllm import envs, plugins
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.logger import init_logger

from eos_vllm.core.plan import Planner
from eos_vllm.page.plan_routes import router as plan_router
from eos_vllm.page.routes import add_page
from eos_vllm.serving import request_checks
from eos_vllm.serving.metrics import set_lost, set_reduction_seconds
from eos_vllm.serving.options import KEY, planner_of
from eos_vllm.serving.plan_endpoint import plan_context
from eos_vllm.serving.status import FrontEndStatus, Status, build_status
from eos_vllm.serving.trace_endpoint import router as trace_router

# A probe within this time of the last one is answered with what that one found.
FRESH_SECONDS = 1.0
# Workers answer between two steps.
ANSWER_SECONDS = 5.0
# The gauge on /metrics is right even where nobody asks for the status.
REFRESH_SECONDS = 10.0
logger = init_logger("vllm.eos")
router = APIRouter(prefix="/eos", tags=["eos"])


class Watch:
    """Asks the engines, not more often than it should, and keeps ``eos_proof_lost``."""

    def __init__(self, client: Any, planner: Planner, servers: int = 1) -> None:
        self.client, self.planner, self.servers = client, planner, servers
        self.source = str(client.vllm_config.additional_config[KEY]["source"])
        self.lock = asyncio.Lock()
        self.asked: asyncio.Future[Any] | None = None  # a call that has not been answered yet
        self.last: Status | None = None
        self.at = 0.0

    async def status(self) -> Status:
        """The document, at most :data:`FRESH_SECONDS` old."""
        async with self.lock:
            if self.last is None or time.monotonic() - self.at >= FRESH_SECONDS:
                engines, unanswered = await self._ask()
                status = build_status(self.planner, self.source, engines, self._front_end(), unanswered)
                self._tell(status)
                self.last, self.at = status, time.monotonic()
            return self.last

    async def _ask(self) -> tuple[list[Any], str | None]:
        """Reports of all workers by engine, or why there are none.

        A call that is late is waited for again the next time, not repeated: an engine in a long step has one to answer.
        vLLM is given no time limit, for an answer that it stopped waiting for would be taken for that of its next call.
        """
        if self.asked is None:
            self.asked = asyncio.ensure_future(reports_of(self.client))
        done, _ = await asyncio.wait({self.asked}, timeout=ANSWER_SECONDS)
        if not done:
            return [], f"the workers did not answer within {ANSWER_SECONDS:g} s"
        answered, self.asked = self.asked, None
        if (error := answered.exception()) is not None:
            return [], f"the workers could not be asked: {type(error).__name__}: {error}".splitlines()[0]
        return answered.result(), None

    def _front_end(self) -> FrontEndStatus:
        seen = request_checks.SEEN
        index = self.client.engine_core.client_index
        return FrontEndStatus(server=index, servers=self.servers, requests=seen.checked, refused=seen.refused)

    def _tell(self, status: Status) -> None:
        for engine in status.engines:
            set_lost(engine.engine, any(worker.lost for worker in engine.workers))
            if spent := [w.reduction_seconds for w in engine.workers if w.reduction_seconds is not None]:
                set_reduction_seconds(engine.engine, max(spent))
        if status.reasons and (self.last is None or self.last.reasons != status.reasons):
            logger.error("eos: the reduction is not proved: %s", "; ".join(status.reasons))

    async def keep_on(self) -> None:
        """Looks again and again, for as long as the server runs."""
        while True:
            try:
                await self.status()
            except Exception:  # a gauge must not end with one bad answer
                logger.exception("eos: the status could not be built")
            await asyncio.sleep(REFRESH_SECONDS)


async def reports_of(client: Any) -> list[Any]:
    """What ``eos_report`` says in every worker, by engine; ``client.collective_rpc`` would give the first engine's."""
    return await client.engine_core.call_utility_all_async("collective_rpc", "eos_report", None, (), {})


@router.get(
    "/status",
    response_model=Status,
    responses={503: {"model": Status}, 401: {"description": "the server has an API key, and this is another"}},
)
async def status(request: Request) -> Any:
    """Whether the reduction is in place in every worker, with what proof and what counts."""
    state = request.app.state
    if state.eos_guard is not None and not state.eos_guard.verify_token(request.headers):
        return JSONResponse({"error": "Unauthorized"}, status_code=401)
    found: Status = await state.eos_watch.status()
    code = 200 if found.status == "proved" else 503
    return JSONResponse(found.model_dump(), status_code=code, headers={"Cache-Control": "no-store"})


class EosEndpoints:
    """vLLM's ``EndpointPlugin``."""

    name = "eos"
    required_tasks = ("generate",)

    def __init__(self, page: bool = False) -> None:
        self.page = page

    def attach_router(self, app: FastAPI) -> None:
        """Adds the routes; those of the page where it is on."""
        app.include_router(router)
        if self.page:
            app.include_router(plan_router)
            add_page(app)
            app.include_router(trace_router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Makes the guard, which vLLM has for paths of its own only, of the server's keys; and starts to watch."""
        planner = None if engine_client is None else planner_of(engine_client.vllm_config)
        if planner is None:
            raise RuntimeError("eos: endpoints were asked for in a server without a profile")
        keys = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
        state.eos_guard = AuthenticationMiddleware(state, keys) if keys else None  # type: ignore[arg-type]
        if self.page:
            state.eos_plan = plan_context(engine_client.vllm_config)
        state.eos_client = engine_client
        state.eos_watch = Watch(engine_client, planner, args.api_server_count or 1)
        state.eos_watching = asyncio.create_task(state.eos_watch.keep_on(), name="eos watch")


def install_endpoints(page: bool = False) -> None:
    """Adds :class:`EosEndpoints` to the plugins that vLLM attaches to its app; called where a profile is active.

    ``page`` says whether the page, and with it traces, are on.

    Symptom without it: no status, unless ``VLLM_PLUGINS`` is set. Cause and why not an entry point: see the module's
    text. Why safe: what vLLM found comes first, and vLLM attaches ours as it does those. Can go when vLLM lets a
    general plugin add routes.
    """
    plugins.eos_page = page  # type: ignore[attr-defined]
    if getattr(plugins, "eos_installed", False):
        return
    plugins.eos_installed = True  # type: ignore[attr-defined]
    load: Callable[..., list[Any]] = plugins.load_endpoint_plugins

    @functools.wraps(load)
    def with_ours(supported_tasks: Any = None) -> list[Any]:
        serves = supported_tasks is not None and set(EosEndpoints.required_tasks) & set(supported_tasks)
        return [*load(supported_tasks), *([EosEndpoints(plugins.eos_page)] if serves else [])]  # type: ignore[attr-defined]

    plugins.load_endpoint_plugins = with_ours
