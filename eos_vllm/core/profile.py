"""The operator profile: what the search exports and the server serves.

The parameters are those of the paper's Eq. 9 and Definition 2.1. Schema ``eos-profile/2`` adds ``importance.window``
and the query rule ``image``; a file of ``eos-profile/1`` means what it always meant: all later text of the prompt asks.
"""

import itertools
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from eos_vllm.core.errors import ProfileError
from eos_vllm.core.operator import OperatorParams

SCHEMA = "eos-profile/2"
SCHEMAS = ("eos-profile/1", SCHEMA)
MAX_BYTES = 1 << 20

QueryRule = Literal["relevant_text", "all_text", "last_text", "image"]
WindowKind = Literal["prompt", "turn", "image"]
BudgetMeasure = Literal["final", "layer_average"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ModelSpec(_Part):
    """The model that the profile was made for."""

    architecture: str = Field(min_length=1, max_length=200)
    num_decoder_layers: int = Field(ge=2, le=1024)
    visual_tokens: int = Field(ge=1, le=65536)


class ImportanceSpec(_Part):
    """How visual tokens are scored: which queries count, and how heads are joined (paper Eq. 7's q).

    ``window`` bounds the text that counts (:mod:`eos_vllm.core.windows`): ``turn`` if absent, ``prompt`` in schema 1.
    ``queries: image`` lets the image's own last tokens ask, whatever the question; its window is the image.
    """

    queries: QueryRule = "relevant_text"
    window: Literal["prompt", "turn"] | None = None
    heads: Literal["mean"] = "mean"


class OperatorSpec(_Part):
    """Settings that all reducers share: beta of Eq. 4 and the norm that is preserved (Listing 1 or Eq. 6)."""

    gate_sharpness: float = Field(default=10.0, gt=0, le=1e6)
    norm: Literal["token", "frobenius"] = "token"


class Reducer(_Part):
    """One active reducer. It works after decoder layer ``layer`` (counted from 0) has run."""

    layer: int = Field(ge=-1)
    gate: float = Field(ge=0, le=1)
    discard: float = Field(ge=0, le=1)
    gamma: float = Field(ge=0, le=1)
    tau: float = Field(gt=0)
    theta: float = Field(ge=-1, le=1)
    rho: float = Field(ge=0, le=1)
    nu: float = Field(ge=0, le=1)

    @property
    def retain(self) -> float:
        """Share of visual tokens that the reducer keeps before rescaling, ``1 - g c`` of Eq. 11."""
        return 1.0 - self.gate * self.discard


class Budget(_Part):
    """Retain budget per image: ``tokens`` by ``measure``; no reducer keeps fewer than ``minimum`` (Kmin of Eq. 11)."""

    measure: BudgetMeasure = "final"
    tokens: int = Field(ge=1)
    minimum: int = Field(default=1, ge=1)


class Profile(_Part):
    """A complete operator profile; immutable. ``schedules`` maps a budget to the counts kept after each reducer."""

    schema_: Literal["eos-profile/1", "eos-profile/2"] = Field(alias="schema")
    name: str = Field(min_length=1, max_length=200)
    description: str = Field(default="", max_length=4000)
    model: ModelSpec
    importance: ImportanceSpec = ImportanceSpec()
    operator: OperatorSpec = OperatorSpec()
    reducers: tuple[Reducer, ...] = Field(min_length=1)
    budget: Budget
    schedules: dict[str, tuple[int, ...]] = {}
    provenance: dict[str, Any] = {}

    @field_validator("reducers", mode="before")
    @classmethod
    def _reducers_from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("schedules", mode="before")
    @classmethod
    def _schedules_from_lists(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: tuple(counts) if isinstance(counts, list) else counts for key, counts in value.items()}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        layers, depth, visual = self.layers, self.model.num_decoder_layers, self.model.visual_tokens
        if self.schema_ != SCHEMA and (self.importance.window or self.importance.queries == "image"):
            raise ValueError(f"importance: window and queries=image need schema {SCHEMA}")
        if self.importance.window and self.importance.queries == "image":
            raise ValueError("importance.window: queries=image has no window but the image; leave it out")
        for i, reducer in enumerate(self.reducers):
            if reducer.layer < 0:
                raise ValueError(f"reducers[{i}].layer=-1 is reserved for reducers before the language model")
            if reducer.layer >= depth - 1:
                raise ValueError(
                    f"reducers[{i}].layer={reducer.layer} is too deep: of {depth} layers, {depth - 2} is the last"
                )
            if reducer.retain <= 0:
                raise ValueError(f"reducers[{i}]: gate*discard={reducer.gate * reducer.discard} must be below 1")
        if any(a >= b for a, b in itertools.pairwise(layers)):
            raise ValueError(f"reducers: layers {list(layers)} must strictly increase")
        if self.budget.minimum > visual:
            raise ValueError(f"budget.minimum={self.budget.minimum} exceeds model.visual_tokens={visual}")
        for key, counts in self.schedules.items():
            _check_schedule(key, counts, len(layers), visual)
        return self

    @property
    def window(self) -> WindowKind:
        """Which part of the prompt may score an image."""
        if self.importance.queries == "image":
            return "image"
        return self.importance.window or ("turn" if self.schema_ == SCHEMA else "prompt")

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers after which tokens are reduced, ascending."""
        return tuple(r.layer for r in self.reducers)

    @property
    def num_segments(self) -> int:
        """Runs of decoder layers that see the same tokens: one more than there are reducers."""
        return len(self.reducers) + 1

    def segment_of_layer(self, layer: int) -> int:
        """Index of the segment that decoder layer ``layer`` belongs to: the number of reducers before it."""
        return sum(reducer_layer < layer for reducer_layer in self.layers)

    def segment_layers(self) -> tuple[int, ...]:
        """Number of decoder layers in each segment."""
        edges = (-1, *self.layers, self.model.num_decoder_layers - 1)
        return tuple(b - a for a, b in itertools.pairwise(edges))

    def operator_params(self, index: int) -> OperatorParams:
        """Operator parameters of reducer ``index`` (Definition 2.1)."""
        r = self.reducers[index]
        return OperatorParams(r.gamma, r.tau, r.theta, r.rho, r.nu, self.operator.gate_sharpness, self.operator.norm)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it stands in ``theta.json``."""
        data = self.model_dump(mode="json", by_alias=True)
        if data["importance"]["window"] is None:
            del data["importance"]["window"]
        return data


def _check_schedule(key: str, counts: tuple[int, ...], reducers: int, visual: int) -> None:
    if not (key.isascii() and key.isdigit()) or str(int(key)) != key or int(key) < 1:
        raise ValueError(f"schedules: budget {key!r} is no positive whole number")
    if len(counts) != reducers:
        raise ValueError(f"schedules[{key}]={list(counts)} needs one count for each of the {reducers} reducers")
    if any(a < b for a, b in zip((visual, *counts), counts, strict=False)) or min(counts) < 1:
        raise ValueError(f"schedules[{key}]={list(counts)} must not increase and lie in 1..{visual}")


def parse_profile(data: str | bytes | dict[str, Any], source: str = "profile") -> Profile:
    """Validates a profile.

    Args:
        data: JSON text or plain data.
        source: where it came from, named in errors.

    Raises:
        ProfileError: not JSON, over 1 MiB, unknown or missing field, out of range, inconsistent.
    """
    if isinstance(data, str | bytes):
        size = len(data if isinstance(data, bytes) else data.encode())
        if size > MAX_BYTES:
            raise ProfileError("profile", source, f"it has {size} bytes", f"a profile has at most {MAX_BYTES}")
        try:
            data = json.loads(data)
        except (ValueError, RecursionError) as e:
            raise ProfileError("profile", source, f"it is no JSON ({e})", f"give a file of schema {SCHEMA}") from None
    if not isinstance(data, dict):
        raise ProfileError("profile", source, "it is no JSON object", f"give a file of schema {SCHEMA}")
    if data.get("schema") not in SCHEMAS:
        raise ProfileError(
            "profile.schema", data.get("schema"), "unknown schema", f"this version reads {' and '.join(SCHEMAS)}"
        )
    try:
        return Profile.model_validate(data)
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
        where = ".".join(str(part) for part in error["loc"]) or "(whole)"
        more = f" (and {e.error_count() - 1} more)" if e.error_count() > 1 else ""
        value = error["input"] if where != "(whole)" else source
        problem = error["msg"].removeprefix("Value error, ") + more
        raise ProfileError(
            f"profile.{where}", value, problem, f"correct it in {source}; see `eos-vllm profile schema`"
        ) from None


def read_profile(path: str | Path) -> Profile:
    """Reads and validates a profile file; errors as in :func:`parse_profile`."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as e:
        raise ProfileError("profile", str(path), e.strerror or str(e), "give the path of a readable file") from None
    return parse_profile(data, str(path))


def check_fits(profile: Profile, geometry: Any) -> None:
    """Whether ``profile`` was made for a model of this architecture, depth and number of visual tokens.

    Args:
        profile: any profile.
        geometry: what has the three attributes of :class:`ModelSpec`.

    Raises:
        ProfileError: architecture, depth or visual tokens differ.
    """
    for name in ("architecture", "num_decoder_layers", "visual_tokens"):
        want, have = getattr(profile.model, name), getattr(geometry, name)
        if want != have:
            remedy = "give the model that it was made for, or adapt it with `eos-vllm profile scale`"
            raise ProfileError(f"profile.model.{name}", want, f"the model has {have}", remedy)
