"""Settings of a search: the same names as command-line flags, as fields of a JSON config, and in the run's folder."""

import argparse
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from eos_search.estimators.base import KeepName
from eos_search.measures import SearchMeasure
from eos_search.objective import AlignOn, BudgetGates
from eos_search.theta import GATE_OFF, GATE_ON, Kind, StartName
from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import QueryRule

DataFormat = Literal["cluttervqa", "jsonl", "llava", "huggingface"]
CONFIGS = Path(__file__).with_name("configs")
# Where a run writes and how fast it works changes nothing in its result.
NOT_RESULT = ("output", "workers", "cache_mib", "log_every", "checkpoint_every", "checkpointing", "device", "images")


def _split(value: Any) -> Any:
    """Lists come from the command line as text with commas."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


Layers = Annotated[tuple[int, ...], BeforeValidator(_split)]
Kinds = Annotated[tuple[Kind, ...], BeforeValidator(_split)]


class SearchSettings(BaseModel):
    """All settings of a search; defaults are the paper's (Table 5) where it gives any."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = Field(description="directory or name of a Hugging Face LLaVA, or 'embedded'")
    output: Path = Field(description="folder for theta.json, logs and checkpoints")
    name: str = Field("searched", min_length=1, max_length=200, description="name of the exported profile")

    data: str = Field("", description="file, folder or data set name; nothing for cluttervqa, which is drawn")
    data_format: DataFormat = Field("jsonl", description="cluttervqa, jsonl, llava (LLaVA-mix-665K) or huggingface")
    images: Path | None = Field(None, description="folder that image paths start from (default: that of the data file)")
    split: str = Field("train", description="split of cluttervqa or of a Hugging Face data set")
    benchmark_version: int = Field(1, ge=1, le=2, description="of cluttervqa")
    question_column: str | None = Field(None, description="default: question or prompt")
    answer_column: str | None = Field(None, description="default: answer")
    image_column: str | None = Field(None, description="default: image, images or image_files")
    samples: int = Field(50_000, ge=1, description="rows to use at most, drawn by seed")
    prompt: str = Field("USER: <image>\n{question} ASSISTANT:", description="the model's chat form")
    answer: str = Field(" {answer}", description="how an answer follows the prompt; the end token is appended")
    max_tokens: int = Field(2048, ge=2, description="longer rows are skipped")

    budget: int = Field(64, ge=1, description="B: visual tokens of an image that may be left")
    serve_budgets: Layers = Field((), description="budgets that examples take in turn (default: Theta's own counts)")
    budget_measure: SearchMeasure = Field("final", description="final (Eq. 13), or what layers see of an image")
    budget_gates: BudgetGates = Field("acting", description="gates that count in it: acting, or all as in Eq. 13")
    constraint: Literal["penalty", "lagrangian"] = Field("penalty", description="Eq. 13's, or one that is met")
    max_reducers: int = Field(3, ge=1, description="C: layers that may reduce")
    minimum: int = Field(1, ge=1, description="Kmin: visual tokens that every reducer leaves")
    select: str | None = Field(None, description="selector before the decoder: uniform, maxmin, ... (default: none)")
    withdraw: int | None = Field(None, ge=1, description="layer behind which images cost nothing (default: none)")
    lambda_align: float = Field(0.1, ge=0, description="weight of the alignment")
    lambda_kl: float = Field(0.0, ge=0, description="weight of the divergence from the unreduced model's answers")
    lambda_budget: float = Field(1.0, ge=0, description="weight of the token budget")
    lambda_cost: float = Field(1.0, ge=0, description="weight of the number of active layers")
    cross_entropy: bool = Field(True, description="false: the alignment alone is the task")
    align_on: AlignOn = Field("text", description="text states (Eq. 14) or visual ones (Eq. 23)")
    align_layers: Layers | None = Field(None, description="layers of the alignment (default: 4, 8, 12, ...)")

    start: StartName = Field("warm", description="warm (gamma near 0) or uniform (gamma 0.5, Table 5)")
    start_budget: int | None = Field(None, ge=1, description="budget that discards meet at the start (default: B)")
    placement: Layers | None = Field(None, description="layers active at the start (default: Table 5's, scaled)")
    frozen: Kinds = Field((), description="kinds of parameter that stay as they start, such as gate,discard")
    gate_scale: float = Field(5.0, gt=0, le=1000, description="Tg of Eq. 10")
    gate_scale_start: float | None = Field(None, gt=0, le=1000, description="Tg at first (default: gate_scale)")
    gate_settled: float = Field(0.5, gt=0, le=1, description="share of the steps after which Tg is gate_scale")
    gate_on: float = Field(GATE_ON, gt=0, lt=1, description="gates of the placement at the start")
    gate_off: float = Field(GATE_OFF, gt=0, lt=1, description="most that other gates start with")
    gate_rate: float = Field(1.0, gt=0, le=1, description="learning rate of gates, as a share of that of the rest")
    discard_scale: float = Field(1.0, gt=0, le=1000, description="Tc of Eq. 10")
    epsilon: float = Field(1e-4, gt=0, le=1, description="least assignment temperature")
    gate_tries: int = Field(0, ge=0, description="closed gates tried for gradients in a row of the data (default: all)")
    gate_threshold: float = Field(0.5, gt=0, lt=1, description="a gate above it acts")

    move_every: int = Field(0, ge=0, description="steps between moves of reducers to other layers (default: none)")

    fit_rows: int = Field(0, ge=0, description="rows that choose counts at served budgets (default: none)")
    fit_budgets: Layers = Field((), description="served budgets whose counts they choose (default: all)")

    queries: QueryRule = Field("relevant_text", description="query rule of the importance scores")
    norm: Literal["token", "frobenius"] = Field("token", description="norm that nu preserves")
    gate_sharpness: float = Field(10.0, gt=0, le=1e6, description="beta of Eq. 4")
    boundary_sharpness: float = Field(10.0, ge=0, le=1e6, description="alpha of Eq. 12, scores in units of their mean")
    keep_estimator: KeepName = Field("ghosts", description="how the loss learns what counts do to it")
    keep_width: float = Field(0.1, gt=0, lt=1, description="how far ghosts and differences look, as a share of a count")
    keep_every: int = Field(1, ge=1, description="differences are measured at every so many rows")

    steps: int = Field(4000, ge=1, description="optimiser steps")
    batch_size: int = Field(4, ge=1, description="examples per step, over all processes together")
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    warmup: float = Field(0.05, ge=0, le=1, description="share of the steps with a rising learning rate")
    seed: int = Field(42, ge=0, lt=2**32)

    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 on a GPU, else float32")
    device: Literal["auto", "cpu"] = Field("auto", description="auto: what accelerate finds")
    checkpointing: bool = Field(False, description="gradient checkpointing: less memory, a third more time")
    workers: int = Field(0, ge=0, le=256, description="data loader processes")
    cache_mib: int = Field(512, ge=0, description="memory for embeddings and unreduced states of examples seen again")
    log_every: int = Field(10, ge=1, description="steps between records of Theta itself")
    checkpoint_every: int = Field(100, ge=1, description="steps between checkpoints")

    @field_validator("serve_budgets", "fit_budgets")
    @classmethod
    def _budgets_are_positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(budget < 1 for budget in value):
            raise ValueError("a budget is at least 1")
        return value

    @field_validator("placement", "align_layers", "select", "withdraw", mode="before")
    @classmethod
    def _none_from_text(cls, value: Any) -> Any:
        return None if value in ("", "default", "none") else value

    def differences(self, other: Self) -> list[str]:
        """Names of the settings that differ from ``other`` and may change the result."""
        return [
            field
            for field in type(self).model_fields
            if field not in NOT_RESULT and getattr(self, field) != getattr(other, field)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as it stands in a config."""
        return self.model_dump(mode="json")


def read_settings(config: Mapping[str, Any], flags: Mapping[str, Any] | None = None) -> SearchSettings:
    """Settings from a config, with flags over it.

    Raises:
        SettingError: unknown or missing setting, or a value out of range; the first one is named.
    """
    try:
        return SearchSettings.model_validate({**config, **(flags or {})})
    except ValidationError as e:
        error = e.errors(include_url=False)[0]
        field = str(error["loc"][0]) if error["loc"] else "config"
        value = "nothing" if error["type"] == "missing" else error["input"]
        problem = error["msg"].removeprefix("Value error, ")
        raise SettingError(field, value, problem, "see `eos-search run --help`") from None


def read_config(name: str) -> dict[str, Any]:
    """A JSON config: a file, or the name of one that comes with the package.

    Raises:
        SettingError: no such config, or it is no JSON object.
    """
    known = CONFIGS / f"{name}.json"
    path = known if known.is_file() else Path(name)
    names = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.json")))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        remedy = f"give a file, or one of {names}"
        raise SettingError("config", name, f"it cannot be read ({e.strerror})", remedy) from None
    except ValueError as e:
        raise SettingError("config", name, f"it is no JSON ({e})", "give a JSON object of settings") from None
    if not isinstance(data, dict):
        raise SettingError("config", name, "it is no JSON object", "give a JSON object of settings")
    return data


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each setting; those that are not given are absent from the namespace."""
    for name, field in SearchSettings.model_fields.items():
        default = "" if field.is_required() or field.default in (None, "", ()) else f" (default: {field.default!r})"
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            metavar=_metavar(field.annotation),
            help=((field.description or "") + default).strip().replace("%", "%%"),
        )


def given_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The settings among parsed arguments."""
    return {name: value for name, value in vars(args).items() if name in SearchSettings.model_fields}


def _metavar(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        annotation = next(part for part in get_args(annotation) if part is not type(None))
        origin = get_origin(annotation)
    if origin is Annotated:
        return "A,B,..."
    if origin is Literal:
        return "|".join(get_args(annotation))
    if origin is tuple:
        return "A,B,..."
    return {int: "N", float: "X", bool: "true|false", Path: "PATH"}.get(annotation, "TEXT")
