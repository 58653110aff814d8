"""What ``POST /eos/plan`` and ``GET /eos/choices`` take and answer; every bound of their input stands here."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr

from eos_vllm.analysis.advice import MOST_CONCURRENCY, MOST_IMAGES, MOST_TOKENS, Advice, By
from eos_vllm.analysis.choices import Point

MOST_BUDGETS = 8


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PlanRequest(_Request):
    """A prompt, and the budgets to plan it at."""

    budgets: list[StrictInt | StrictFloat | StrictStr | None] = Field(
        min_length=1,
        max_length=MOST_BUDGETS,
        description='visual tokens per image, or a share such as "11%"; null: the server\'s own',
    )
    text_tokens: StrictInt = Field(default=88, ge=0, le=MOST_TOKENS)
    output_tokens: StrictInt = Field(default=0, ge=0, le=MOST_TOKENS, description="generated; they hold KV as well")
    images: StrictInt = Field(default=1, ge=1, le=MOST_IMAGES)
    visual_tokens: StrictInt | None = Field(default=None, ge=1, le=MOST_TOKENS, description="of an image")
    size: tuple[StrictInt, StrictInt] | None = Field(
        default=None,
        description="width and height of an image in pixels, instead of visual_tokens; no matter to models whose "
        "images have a fixed number of tokens",
    )


class Cost(BaseModel):
    """What one prompt costs."""

    tokens: int = Field(description="in its first layer, answer included")
    layer_tokens: list[int] = Field(description="that each decoder layer caches, answer included")
    kv_blocks: int = Field(description="KV blocks that it holds, answer included")
    kv_bytes: int = Field(description="the same in bytes, whole blocks, all ranks together")
    prefill_flops: int = Field(description="of the decoder layers, for the prompt")


class PlanSegment(BaseModel):
    """Decoder layers that see the same tokens."""

    layer_from: int
    layers: int
    tokens: int = Field(description="that each layer caches, answer included")
    kv_blocks: int = Field(description="of the whole segment")


class BudgetPlan(Cost):
    """A prompt at one budget."""

    budget: int | float | str
    counts: list[int] = Field(description="visual tokens of an image left after each reducer, rounded as served")
    layers: list[int] = Field(description="decoder layer of each reducer; -1 is before the decoder")
    layer_average: float = Field(description="mean over decoder layers of an image's cached tokens")
    final: int = Field(description="visual tokens left after the last reducer")
    kv_share: float = Field(description="KV of visual tokens over stock's, not in blocks")
    held_share: float = Field(description="kv_bytes over stock's: 1 / it is how many times the requests fit")
    flops_share: float
    segments: list[PlanSegment]


class Plans(BaseModel):
    """The answer of ``POST /eos/plan``: the figures of ``eos-vllm plan``."""

    profile: str
    measure: str = Field(description="what budgets are measured by")
    visual_tokens: int = Field(description="of an image, before any reduction")
    block_size: int
    dtype: str = Field(description="of the KV cache")
    stock: Cost
    plans: list[BudgetPlan]


class ServedPoint(Point):
    """A measured point, and whether this server can be asked for it."""

    served_here: bool = Field(description="the server's profile does the same, and `budget` means the same to it")
    counts_here: list[int] | None = Field(
        description="what this server keeps at that budget, rounded to KV blocks as it serves; null where not served"
    )


class ChoicesAnswer(BaseModel):
    """The answer of ``GET /eos/choices``."""

    model: str = Field(description="what accuracy was measured on")
    source: str
    visual_tokens: int
    origin: list[dict[str, Any]] = Field(description="raw results: files, digests, revisions, machines")
    baselines: list[dict[str, Any]] = Field(description="all tokens, for each source")
    points: list[ServedPoint]
    load_tests: list[dict[str, Any]] = Field(description="requests per second over HTTP, of random weights")
    recommendation: Advice | None = Field(description="where kv_gib, concurrency and accuracy_floor are given")


class AdviceQuery(_Request):
    """What a recommendation is asked for; all three without a default, or none."""

    kv_gib: float
    concurrency: int = Field(le=MOST_CONCURRENCY)
    accuracy_floor: float
    prompt: int = 88
    output: int = 256
    images: int = 1
    by: By = "low"
    profile: str = Field(default="all", max_length=1000, description="names between commas, or all")
