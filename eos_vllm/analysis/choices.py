"""Accuracy against cost of profiles and budgets, as measured: the package's own data, made by ``make choices``.

Every figure is taken or computed from raw results of the repository (``origin`` names files and digests). A point is of
one model and one profile at one budget. Intervals are 95 %, by bootstrap over images; ranges are the slowest and the
fastest round.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

import eos_vllm
from eos_vllm.analysis.scaling import upgrade
from eos_vllm.core.errors import EosError
from eos_vllm.core.profile import Profile, parse_profile

SCHEMA = "eos-choices/1"
FILE = Path(eos_vllm.__file__).parent / "page" / "data" / "choices.json"
# What a profile is called, where it comes from, and what it takes a budget for, beside what it does to tokens.
_TALK = ("schema", "name", "description", "provenance", "budget", "schedules")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Interval(_Part):
    """A share and its 95 % interval."""

    mean: float
    low: float
    high: float
    questions: int = Field(description="how many it rests on")


class Range(_Part):
    """Requests per second over some rounds: their mean, the slowest and the fastest."""

    value: float
    low: float
    high: float
    rounds: int


class Point(_Part):
    """One profile at one budget on one model."""

    model: str
    profile: str = Field(description="name; those without a prefix are one selector before the decoder, nothing else")
    does: str = Field(description="digest of what the profile does; key of `profiles`")
    shipped: str | None = Field(description="shipped profile that is this very one; null where none is")
    measure: str = Field(description="what the budget is measured by")
    budget: int = Field(description="visual tokens per image, by that measure")
    counts: tuple[int, ...] = Field(description="visual tokens left after each reducer; exact, not rounded to blocks")
    layer_average: float = Field(description="mean over decoder layers of an image's cached tokens")
    kv_share: float = Field(description="visual KV over stock's: layer average over visual tokens, not in blocks")
    accuracy: Interval = Field(description="right answers, kinds of questions weighing alike")
    relative: Interval = Field(description="accuracy over that of all tokens on the same questions, paired")
    without_counting: float = Field(description="accuracy over all kinds of questions but counting")
    without_counting_interval: tuple[float, float]
    requests_per_second: Range | None = Field(description="of the same profile in vLLM; null: not measured")
    stock_ratio: float | None = Field(description="requests per second over stock's of the same runs")
    stock_ratio_range: tuple[float, float] | None = Field(description="slowest over fastest, fastest over slowest")
    source: str = Field(description="file of the raw result")


class Baseline(_Part):
    """All tokens, on the same questions as the points of the same source."""

    model: str
    visual_tokens: int
    accuracy: Interval
    without_counting: float
    without_counting_interval: tuple[float, float]
    source: str


class LoadTest(_Part):
    """Requests per second over HTTP in one scenario under one load; of random weights, so no accuracy goes with it."""

    model: str
    profile: str
    budget: int
    scenario: str
    users: int
    requests_per_second: Range
    stock_ratio: float
    stock_ratio_interval: tuple[float, float] | None = Field(description="95 %; null where it was measured once")
    verdict: str
    source: str


class Origin(_Part):
    """A raw result."""

    file: str
    sha256: str = Field(description="of the file; of a folder: of its JSON files' names and digests")
    git: str = Field(description="revision that the file says it was begun with")
    created: str
    machine: str
    measured_at: dict[str, str] = Field(description="revisions of parts that were measured later")
    about: str


class Choices(_Part):
    """All of it."""

    schema_: str = Field(alias="schema")
    model: str = Field(description="the model of all points")
    source: str
    visual_tokens: int
    weights: str = Field(description="digest of the model's weights")
    origin: tuple[Origin, ...]
    baselines: tuple[Baseline, ...]
    points: tuple[Point, ...]
    load_tests: tuple[LoadTest, ...]
    profiles: dict[str, dict[str, Any]] = Field(description="profiles of the points, by what they do")

    def profile(self, point: Point) -> Profile:
        """The profile that a point was measured with, the point's budget as its own."""
        data = self.profiles[point.does]
        own = data["budget"] | {"tokens": point.budget}
        return parse_profile(data | {"budget": own}, point.profile)

    def baseline(self, point: Point) -> Baseline:
        """All tokens, on the point's questions."""
        return next(b for b in self.baselines if (b.source, b.model) == (point.source, point.model))

    def origin_of(self, point: Point) -> Origin:
        """The raw result that a point is from."""
        return next(origin for origin in self.origin if origin.file == point.source)


def parse_choices(text: str) -> Choices:
    """Reads what ``make choices`` wrote.

    Raises:
        EosError: it is something else.
    """
    try:
        found = Choices.model_validate(json.loads(text))
    except ValueError as error:
        problem = f"it cannot be read ({str(error).splitlines()[0]})"
        raise EosError("choices", FILE.name, problem, "make it again with: make choices") from None
    if found.schema_ != SCHEMA:
        raise EosError("choices", found.schema_, f"this version reads {SCHEMA}", "make it again with: make choices")
    return found


@lru_cache(maxsize=1)
def choices() -> Choices:
    """The package's own, read once.

    Raises:
        EosError: the package was built without it.
    """
    try:
        text = FILE.read_text(encoding="utf-8")
    except OSError as error:
        problem = f"is not in this installation ({error.strerror})"
        raise EosError("choices", FILE.name, problem, "make it with: make choices") from None
    return parse_choices(text)


def acts(profile: Profile) -> dict[str, Any]:
    """What a profile does to single questions, as plain data: all but its budget, however that is measured.

    Windows of kind ``turn`` and ``prompt`` keep the same tokens there, so the window is left out.
    """
    data = {key: value for key, value in upgrade(profile).to_dict().items() if key not in _TALK}
    data["model"].pop("flops_crossover", None)
    data["importance"].pop("window", None)
    if not profile.inside:
        first = data["reducers"][0]
        # One cut before the decoder: the budget alone says how deep, and no text is asked.
        data["importance"], first["gate"], first["discard"] = {}, 1.0, 1.0
        if not (first["gamma"] or first["rho"] or first["nu"]):
            first["tau"] = first["theta"] = 0.0
    return data
