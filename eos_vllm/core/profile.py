"""The operator profile: what the search exports and the server serves.

The parameters are those of the paper's Eq. 9 and Definition 2.1. Schema ``eos-profile/2`` adds windows, the query rule
``image``, options of the score, selection before the decoder (``layer: -1``), withdrawal, means, and budgets by cost; a
file of ``eos-profile/1`` means what it always meant: all later text of the prompt asks.
"""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from eos_vllm.core.errors import ProfileError
from eos_vllm.core.operator import OperatorParams
from eos_vllm.core.selectors import AnySelector, Selector
from eos_vllm.core.selectors.maxmin import MaxMin

SCHEMA = "eos-profile/2"
SCHEMAS = ("eos-profile/1", SCHEMA)
MAX_BYTES = 1 << 20

QueryRule = Literal["relevant_text", "all_text", "last_text", "image"]
WindowKind = Literal["prompt", "turn", "image"]
BudgetMeasure = Literal["final", "layer_average", "flops", "kv_bytes"]
# Of a reducer that works on what the vision tower gives, before decoder layer 0.
BEFORE = -1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class ModelSpec(_Part):
    """The model that the profile was made for.

    ``visual_tokens``: of an image; null for images of any size, whose counts follow from each one's own number.
    ``flops_crossover``: number of tokens at which attention's square costs as many FLOPs as a layer's matrices (24704
    in LLaVA-1.5-7B); needed where a budget is measured by ``flops``.
    """

    architecture: str = Field(min_length=1, max_length=200)
    num_decoder_layers: int = Field(ge=2, le=1024)
    visual_tokens: int | None = Field(ge=1, le=65536)
    flops_crossover: int | None = Field(default=None, ge=1)


class ImportanceSpec(_Part):
    """How visual tokens are scored: which queries count, and how heads are joined (paper Eq. 7's q).

    ``window`` bounds the text that counts (:mod:`eos_vllm.core.windows`): ``turn`` if absent, ``prompt`` in schema 1.
    ``queries: image`` lets the image's own last tokens ask, whatever the question; its window is the image. ``heads``
    names those whose mean counts, in all layers alike; ``reduce`` joins queries. ``debias`` holds what each place of
    the image receives on average: scores are divided by it before top-K.
    """

    queries: QueryRule = "relevant_text"
    window: Literal["prompt", "turn"] | None = None
    reduce: Literal["mean", "max"] = "mean"
    heads: Literal["mean"] | tuple[int, ...] = "mean"
    debias: tuple[float, ...] | None = None

    @field_validator("heads", "debias", mode="before")
    @classmethod
    def _tuple_from_list(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class OperatorSpec(_Part):
    """Settings that all reducers share: beta of Eq. 4, the norm that is preserved (Listing 1 or Eq. 6), and whether an
    anchor takes the sum of what it receives (Eq. 3) or the mean with it."""

    gate_sharpness: float = Field(default=10.0, gt=0, le=1e6)
    norm: Literal["token", "frobenius"] = "token"
    aggregate: Literal["sum", "mean"] = "sum"


class Reducer(_Part):
    """One active reducer. It works after decoder layer ``layer`` (counted from 0) has run.

    With ``layer: -1`` it works on the vision tower's output: ``select`` names the selector that chooses the anchors
    (``maxmin`` if absent), and the prompt holds as many placeholders as are kept.
    """

    layer: int = Field(ge=BEFORE)
    select: AnySelector | None = None
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


class Withdrawal(_Part):
    """From behind decoder layer ``layer`` on an image costs nothing: no visual token goes on. The last reducer only."""

    layer: int = Field(ge=0)
    withdraw: Literal[True]

    gate: ClassVar[float] = 1.0
    discard: ClassVar[float] = 1.0
    gamma: ClassVar[float] = 0.0
    tau: ClassVar[float] = 1.0
    theta: ClassVar[float] = 0.0
    rho: ClassVar[float] = 0.0
    nu: ClassVar[float] = 0.0
    retain: ClassVar[float] = 0.0


def _kind(value: Any) -> str:
    withdraws = isinstance(value, Withdrawal) or (isinstance(value, dict) and "withdraw" in value)
    return "withdrawal" if withdraws else "reducer"


_TAGS = ("withdrawal", "reducer")
AnyReducer = Annotated[
    Annotated[Reducer, Tag("reducer")] | Annotated[Withdrawal, Tag("withdrawal")], Discriminator(_kind)
]


class Budget(_Part):
    """Retain budget per image by ``measure``: ``tokens``, or a ``share`` of the image's own. No reducer keeps fewer
    than ``minimum`` (Kmin of Eq. 11).

    By ``final`` it is what is left behind the last reducer (of those that withdraw nothing). By the others it is a
    cost: that of carrying so many visual tokens through every layer, in cached tokens (``layer_average``, and
    ``kv_bytes``, which is the same) or in FLOPs of the prefill (``flops``).
    """

    measure: BudgetMeasure = "final"
    tokens: int | None = Field(default=None, ge=1)
    share: float | None = Field(default=None, gt=0, le=1)
    minimum: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.tokens is None) == (self.share is None):
            raise ValueError("give either tokens or share")
        return self


class Profile(_Part):
    """A complete operator profile; immutable. ``schedules`` maps a budget to the counts kept after each reducer."""

    schema_: Literal["eos-profile/1", "eos-profile/2"] = Field(alias="schema")
    name: str = Field(min_length=1, max_length=200)
    description: str = Field(default="", max_length=4000)
    model: ModelSpec
    importance: ImportanceSpec = ImportanceSpec()
    operator: OperatorSpec = OperatorSpec()
    reducers: tuple[AnyReducer, ...] = Field(min_length=1)
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
        layers, depth = [r.layer for r in self.reducers], self.model.num_decoder_layers
        if self.schema_ != SCHEMA:
            self._check_schema_1()
        if self.importance.window and self.importance.queries == "image":
            raise ValueError("importance.window: queries=image has no window but the image; leave it out")
        for i, reducer in enumerate(self.reducers):
            _check_reducer(i, reducer, depth, len(self.reducers))
        if any(a >= b for a, b in itertools.pairwise(layers)):
            raise ValueError(f"reducers: layers {layers} must strictly increase")
        self._check_score()
        if self.budget.measure == "flops" and self.model.flops_crossover is None:
            raise ValueError(
                "budget.measure=flops needs model.flops_crossover (24704 for LLaVA-1.5-7B; `eos-vllm plan` prints it)"
            )
        if (visual := self.model.visual_tokens) is None:
            self._check_any_size()
            return self
        if self.budget.minimum > visual:
            raise ValueError(f"budget.minimum={self.budget.minimum} exceeds model.visual_tokens={visual}")
        for key, counts in self.schedules.items():
            _check_schedule(key, counts, self.reducers, visual)
        return self

    def _check_any_size(self) -> None:
        """What goes together with images of any size."""
        if self.schedules:
            raise ValueError("schedules: counts need model.visual_tokens; gate and discard give shares of any image")
        if self.importance.debias is not None:
            raise ValueError("importance.debias: its places need model.visual_tokens; leave it out")
        if self.before is None:
            return
        if not self.inside:
            return
        if self.budget.share is None:
            raise ValueError("budget.tokens: reducers behind layer -1, of images of any size, need budget.share")
        if self.budget.measure == "flops":
            raise ValueError("budget.measure=flops: behind layer -1 an image's size is not known; use layer_average")

    def _check_schema_1(self) -> None:
        new = {
            "importance.window": self.importance.window is not None,
            "importance.queries=image": self.importance.queries == "image",
            "importance.reduce": self.importance.reduce != "mean",
            "importance.heads": self.importance.heads != "mean",
            "importance.debias": self.importance.debias is not None,
            "operator.aggregate": self.operator.aggregate != "sum",
            "reducers[0].layer=-1": self.reducers[0].layer == BEFORE,
            "withdraw": isinstance(self.reducers[-1], Withdrawal),
            f"budget.measure={self.budget.measure}": self.budget.measure not in ("final", "layer_average"),
            "model.flops_crossover": self.model.flops_crossover is not None,
            "model.visual_tokens=null": self.model.visual_tokens is None,
            "budget.share": self.budget.share is not None,
        }
        if used := [name for name, is_used in new.items() if is_used]:
            raise ValueError(f"{', '.join(used)}: needs schema {SCHEMA} (`eos-vllm profile upgrade`)")

    def _check_score(self) -> None:
        heads, debias = self.importance.heads, self.importance.debias
        if heads != "mean" and (not heads or len(set(heads)) < len(heads) or min(heads) < 0):
            raise ValueError(f"importance.heads={list(heads)} must be distinct numbers from 0, at least one")
        if debias is not None:
            if self.before is not None:
                raise ValueError("importance.debias: behind layer -1 tokens are no places of the image; leave it out")
            if self.model.visual_tokens not in (None, len(debias)) or min(debias, default=0) <= 0:
                raise ValueError(f"importance.debias needs {self.model.visual_tokens} numbers above 0")

    @property
    def before(self) -> Reducer | None:
        """The reducer before the decoder (``layer: -1``)."""
        first = self.reducers[0]
        return first if isinstance(first, Reducer) and first.layer == BEFORE else None

    @property
    def selector(self) -> Selector | None:
        """What chooses the anchors of the reducer before the decoder."""
        return None if self.before is None else self.before.select or MaxMin()

    @property
    def inside(self) -> tuple[Reducer | Withdrawal, ...]:
        """The reducers within the decoder."""
        return self.reducers if self.before is None else self.reducers[1:]

    @property
    def window(self) -> WindowKind:
        """Which part of the prompt may score an image."""
        if self.importance.queries == "image":
            return "image"
        return self.importance.window or ("turn" if self.schema_ == SCHEMA else "prompt")

    @property
    def layers(self) -> tuple[int, ...]:
        """Decoder layers after which tokens are reduced, ascending."""
        return tuple(r.layer for r in self.inside)

    @property
    def num_segments(self) -> int:
        """Runs of decoder layers that see the same tokens: one more than there are reducers within the decoder."""
        return len(self.inside) + 1

    def segment_of_layer(self, layer: int) -> int:
        """Index of the segment that decoder layer ``layer`` belongs to: the number of reducers before it."""
        return sum(reducer_layer < layer for reducer_layer in self.layers)

    def segment_layers(self) -> tuple[int, ...]:
        """Number of decoder layers in each segment."""
        edges = (-1, *self.layers, self.model.num_decoder_layers - 1)
        return tuple(b - a for a, b in itertools.pairwise(edges))

    def operator_params(self, index: int) -> OperatorParams:
        """Operator parameters of reducer ``index`` of those within the decoder (Definition 2.1)."""
        return self.params_of(self.inside[index])

    def params_of(self, r: Reducer | Withdrawal) -> OperatorParams:
        """Operator parameters of a reducer."""
        o = self.operator
        return OperatorParams(r.gamma, r.tau, r.theta, r.rho, r.nu, o.gate_sharpness, o.norm, o.aggregate)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it stands in ``theta.json``."""
        data = self.model_dump(mode="json", by_alias=True)
        if self.importance.window is None:
            del data["importance"]["window"]
        if self.schema_ != SCHEMA:
            for part, name in (("importance", "reduce"), ("operator", "aggregate")):
                del data[part][name]
        for part, name in (
            ("importance", "debias"),
            ("model", "flops_crossover"),
            ("budget", "tokens"),
            ("budget", "share"),
        ):
            if data[part][name] is None:
                del data[part][name]
        for reducer in data["reducers"]:
            if reducer.get("select", 0) is None:
                del reducer["select"]
        return data


def _check_reducer(i: int, reducer: Reducer | Withdrawal, depth: int, reducers: int) -> None:
    if reducer.layer == BEFORE and i > 0:
        raise ValueError(f"reducers[{i}].layer=-1: only the first reducer can stand before the decoder")
    if reducer.layer >= depth - 1:
        raise ValueError(f"reducers[{i}].layer={reducer.layer} is too deep: of {depth} layers, {depth - 2} is the last")
    if isinstance(reducer, Withdrawal):
        if i < reducers - 1:
            raise ValueError(f"reducers[{i}].withdraw: nothing is left for the reducers behind it; make it the last")
        return
    if reducer.retain <= 0:
        raise ValueError(f"reducers[{i}]: gate*discard={reducer.gate * reducer.discard} must be below 1")
    if reducer.select is None:
        return
    if reducer.layer != BEFORE:
        raise ValueError(f"reducers[{i}].select belongs to layer -1; in the decoder attention selects")
    if reducer.select.rule == "resize" and reducers > 1:
        raise ValueError(f"reducers[{i}].select: resize keeps squares, and reducers behind it need whole KV blocks")
    if reducer.select.mixes and (reducer.gamma or reducer.rho):
        raise ValueError(f"reducers[{i}]: {reducer.select.rule} mixes tokens itself; gamma and rho must be 0")


def _check_schedule(key: str, counts: tuple[int, ...], reducers: tuple[Any, ...], visual: int) -> None:
    if not (key.isascii() and key.isdigit()) or str(int(key)) != key or int(key) < 1:
        raise ValueError(f"schedules: budget {key!r} is no positive whole number")
    if len(counts) != len(reducers):
        raise ValueError(f"schedules[{key}]={list(counts)} needs one count for each of the {len(reducers)} reducers")
    withdraws = isinstance(reducers[-1], Withdrawal)
    if withdraws and counts[-1] != 0:
        raise ValueError(f"schedules[{key}]={list(counts)} must end in 0, for the last reducer withdraws")
    kept = counts[:-1] if withdraws else counts
    if any(a < b for a, b in zip((visual, *counts), counts, strict=False)) or min(kept, default=1) < 1:
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
        where = ".".join(str(part) for part in error["loc"] if part not in _TAGS) or "(whole)"
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


def profile_digest(profile: Profile) -> str:
    """``sha256:`` and the digest of a profile's canonical data; layout and order of a file do not matter."""
    text = json.dumps(profile.to_dict(), sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def check_fits(profile: Profile, geometry: Any) -> None:
    """Whether ``profile`` was made for a model of this architecture, depth and number of visual tokens.

    Args:
        profile: any profile.
        geometry: what has the three attributes of :class:`ModelSpec`; ``visual_tokens`` None where images vary.

    Raises:
        ProfileError: architecture, depth or visual tokens differ.
    """
    for name in ("architecture", "num_decoder_layers", "visual_tokens"):
        want, have = getattr(profile.model, name), getattr(geometry, name)
        if want != have:
            remedy = "give the model that it was made for, or adapt it with `eos-vllm profile scale`"
            have = "images of any size (null)" if have is None else have
            raise ProfileError(f"profile.model.{name}", want, f"the model has {have}", remedy)
