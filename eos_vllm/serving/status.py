"""What ``GET /eos/status`` says, as a pure function of settings and of what the workers report."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, Field

from eos_vllm.core.budget import Share, cost, flops_share, image_size, layer_average
from eos_vllm.core.plan import Planner
from eos_vllm.core.profile import profile_digest


class ProfileStatus(BaseModel):
    """The profile that is served."""

    name: str
    digest: str = Field(description="sha256 of the profile's canonical data, wherever it came from")
    source: str = Field(description="where it came from, without credentials and query")
    measure: str = Field(description="what its budgets are measured by")
    layers: list[int] = Field(description="decoder layers it reduces after; -1 is before the decoder")


class BudgetStatus(BaseModel):
    """The server's own budget, for requests that name none, of an image of ``visual_tokens``."""

    retain: int | str = Field(description="visual tokens per image, or a share of them")
    visual_tokens: int
    kept: list[int] = Field(description="visual tokens left after each reducer, rounded to KV blocks")
    layer_average: float = Field(description="mean over decoder layers of an image's cached tokens")
    kv_share: float = Field(description="visual KV over stock's")
    flops_share: float | None = Field(description="prefill FLOPs over stock's; null where the profile lacks sizes")
    final: float = Field(description="visual tokens left after the last reducer")


class Counts(BaseModel):
    """Since start."""

    images: int
    tokens_in: list[int] = Field(description="visual tokens that met each reducer")
    tokens_kept: list[int] = Field(description="visual tokens that each kept")


class WorkerStatus(BaseModel):
    """One worker, a rank of an engine."""

    rank: int
    runner: str
    rehearsal: str
    segments: list[int] = Field(default=[], description="segment of each decoder layer that it runs")
    backends: list[str] = Field(default=[], description="their attention backends, each once")
    planned: Counts | None = Field(default=None, description="what the scheduler told it to do within the decoder")
    done: Counts | None = Field(default=None, description="what it did")
    reduction_seconds: float | None = Field(default=None, description="spent in reducers within the decoder")
    lost: list[str] = Field(description="what no longer proves its reduction")


class EngineStatus(BaseModel):
    """One engine; there are several with data parallel."""

    engine: int
    workers: list[WorkerStatus]


class FrontEndStatus(BaseModel):
    """The API server that answers; with several of them each counts its own requests (``/metrics`` adds them up)."""

    server: int
    servers: int
    requests: int = Field(description="generation requests that it checked")
    refused: int = Field(description="requests that the plugin answered with a 400")


class Status(BaseModel):
    """Whether the reduction is in place; ``lost`` and ``unknown`` are answered as HTTP 503."""

    status: Literal["proved", "lost", "unknown"]
    reasons: list[str] = Field(description="why it is not proved")
    profile: ProfileStatus
    budget: BudgetStatus
    engines: list[EngineStatus]
    front_end: FrontEndStatus


def public_source(source: str) -> str:
    """A source that may be shown: a URL without user, password, query and fragment."""
    if "://" not in source:
        return source
    parts = urlsplit(source)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"


def budget_status(planner: Planner) -> BudgetStatus:
    """The server's own budget by all four measures."""
    profile, total, kept = planner.profile, planner.visual_tokens, planner.counts()
    average = layer_average(profile, kept, total)
    return BudgetStatus(
        retain=str(planner.budget) if isinstance(planner.budget, Share) else planner.budget,
        visual_tokens=total,
        kept=list(kept),
        layer_average=average,
        kv_share=average / image_size(profile, total),
        flops_share=flops_share(profile, kept, total),
        final=cost(profile, kept, "final", total),
    )


def worker_status(report: Mapping[str, Any]) -> WorkerStatus:
    """A worker's own report (``eos_report``), with equal backends told once."""
    counts = {name: report[name] for name in Counts.model_fields if name in report}
    return WorkerStatus(
        rank=report["rank"],
        runner=report["runner"],
        rehearsal=report["rehearsal"],
        segments=report.get("segments", []),
        backends=sorted(set(report.get("backends", []))),
        planned=report.get("planned"),
        done=Counts(**counts) if counts else None,
        reduction_seconds=report.get("reduction_seconds"),
        lost=report["lost"],
    )


def build_status(
    planner: Planner,
    source: str,
    engines: Sequence[Sequence[Mapping[str, Any]]],
    front_end: FrontEndStatus,
    unanswered: str | None = None,
) -> Status:
    """Puts the document together.

    Args:
        planner: the server's.
        source: of the profile, as given.
        engines: for each engine the reports of its workers; none where they did not answer.
        front_end: of the API server that answers.
        unanswered: why there are no reports.

    Returns:
        ``proved`` only where every worker of every engine said so.
    """
    found = [
        EngineStatus(engine=workers[0]["engine"] if workers else i, workers=[worker_status(w) for w in workers])
        for i, workers in enumerate(engines)
    ]
    lost = [f"engine {e.engine}, worker {w.rank}: {text}" for e in found for w in e.workers for text in w.lost]
    unknown = [unanswered] if unanswered else []
    if not unknown and not (found and all(engine.workers for engine in found)):
        unknown = ["no worker reported"]
    profile = planner.profile
    return Status(
        status="lost" if lost else "unknown" if unknown else "proved",
        reasons=lost + unknown,
        profile=ProfileStatus(
            name=profile.name,
            digest=profile_digest(profile),
            source=public_source(source),
            measure=profile.budget.measure,
            layers=[reducer.layer for reducer in profile.reducers],
        ),
        budget=budget_status(planner),
        engines=found,
        front_end=front_end,
    )
