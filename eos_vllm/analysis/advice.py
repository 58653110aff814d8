"""What is asked for and what comes back where a profile and a budget are chosen (:mod:`eos_vllm.analysis.advise`)."""

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, Field

from eos_vllm.analysis.choices import Interval, Range
from eos_vllm.core.errors import SettingError

GIB = 1 << 30
# What a request may ask for: enough for any machine, and too little to keep one busy.
MOST_TOKENS, MOST_IMAGES, MOST_CONCURRENCY, MOST_KV_GIB = 1 << 20, 64, 1 << 20, 1 << 20
By = Literal["low", "mean"]


@dataclass(frozen=True)
class Wish:
    """What is wanted; ``accuracy_floor`` is a share of all tokens' accuracy, KV memory of all ranks together.

    Raises:
        SettingError: a value out of range.
    """

    kv_gib: float
    concurrency: int
    accuracy_floor: float
    text_tokens: int = 88
    output_tokens: int = 0
    images: int = 1
    by: By = "low"
    profiles: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.kv_gib <= MOST_KV_GIB:
            raise SettingError("kv-gib", self.kv_gib, "there is no such KV cache", f"give GiB up to {MOST_KV_GIB}")
        if not 0 < self.accuracy_floor <= 1:
            problem = "a floor is a share of all tokens' accuracy"
            raise SettingError("accuracy-floor", self.accuracy_floor, problem, "give a number such as 0.95, at most 1")
        for field, value, least, most in (
            ("concurrency", self.concurrency, 1, MOST_CONCURRENCY),
            ("prompt", self.text_tokens, 0, MOST_TOKENS),
            ("output", self.output_tokens, 0, MOST_TOKENS),
            ("images", self.images, 1, MOST_IMAGES),
        ):
            if not least <= value <= most:
                raise SettingError(field, value, "this is out of range", f"give {least} to {most}")


class Speed(BaseModel):
    """Requests per second as they were measured, on the measured model: no forecast for another one."""

    stock_ratio: float
    stock_ratio_range: tuple[float, float] = Field(description="slowest over fastest round, and the other way round")
    requests_per_second: Range
    measured: str = Field(description="of what, how, in which file")
    revisions: dict[str, str] = Field(description="of which parts of that file were measured with which revision")


class Option(BaseModel):
    """A measured profile and budget, planned for the model that is asked about."""

    profile: str
    shipped: str | None = Field(description="shipped profile that is this very one")
    budget: int
    measure: str
    scaled: bool = Field(description="whether the profile was scaled to another depth than it was measured at")
    rounds: bool = Field(description="whether a server rounds its counts to whole KV blocks without --eos-exact-counts")
    counts: list[int] = Field(description="visual tokens left after each reducer, exact")
    layer_average: float
    kv_bytes: int = Field(description="KV that one request holds, prompt and answer in whole blocks")
    prefill_flops: int
    requests_fit: int
    stock_requests_fit: int
    relative: Interval = Field(description="accuracy over all tokens' on the same questions")
    accuracy: Interval
    speed: Speed | None = Field(description="null: not measured")
    model: str = Field(description="the model that accuracy was measured on")
    source: str = Field(description="file of the raw result")
    about: str = Field(description="what it rests on")


class Advice(BaseModel):
    """A choice, or what misses and the nearest."""

    choice: Option | None
    nearest: Option | None = Field(description="where there is no choice: what comes closest")
    misses: list[str] = Field(description="why there is no choice")
    warnings: list[str]
    accuracy_floor: float
    by: By = Field(description="end of the interval that has to reach the floor")
    stock_requests_fit: int
    stock_kv_bytes: int
    considered: int = Field(description="points that could be planned")
    left_out: list[str] = Field(description="points that could not, and why")


_END = {"low": "by the lower end of the 95 % interval", "mean": "by the mean"}


def end_of(by: By) -> str:
    """Which end of an interval decides, in words."""
    return _END[by]
