"""What a sweep measures: its settings from the command line, checked, and as they stand in the raw results."""

import argparse
import hashlib
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eos_vllm.analysis.cost import DTYPE_BYTES
from eos_vllm.core.errors import SettingError
from loadtests.commands import add_option
from loadtests.grid import (
    RESTRICTED,
    SCENARIOS,
    STOCK,
    VISIT_LENGTHS,
    Load,
    parse_loads,
    parse_numbers,
    parse_scenarios,
)
from loadtests.settings import above_zero, at_least_one

# With the 19 tokens that LLaVA's template adds, 88 tokens of text: the prompt of the design's ceilings.
PROMPT_CHARACTERS = 69
# 576 visual tokens, 600 of text, a question and an answer; conversations of three turns are shorter.
_LONGEST = 1408
# Saves a minute or two of compiling; for tests that have both servers alike and compare with themselves.
EAGER = "--enforce-eager"
_OPEN_LOOP_REQUESTS = 32
_LEAST_ANSWERS, _FEW = 3, 8
_POSITIVE = ("minutes", "seconds", "per_user", "window_most", "ramp_most", "wait")


@dataclass(frozen=True)
class SweepOptions:
    """All settings of a sweep; :func:`add_arguments` says what each means."""

    out: Path
    preset: str = "bench-88m"
    model: str | None = None
    profile: str = "sparsevlm-v2-llava-1.5-7b"
    budgets: tuple[int, ...] = (576, 192, 64)
    scenarios: tuple[str, ...] = ("single", "several", "multi_turn", "mixed", "shared_system", "long_text")
    loads: tuple[Load, ...] = (Load(1), Load(8), Load(24))
    restricted: bool = False
    repeats: int = 1
    repeats_close: int = 5
    minutes: float = 45.0
    seconds: float = 8.0
    per_user: float = 0.5
    window_most: float = 60.0
    ramp_most: float = 180.0
    output_tokens: int = 16
    natural: bool = False
    prompt_characters: int | None = PROMPT_CHARACTERS
    system_characters: int = 300
    long_characters: int = 600
    rows: Path | None = None
    seed: int = 0
    dtype: str = "float32"
    max_model_len: int = 2048
    kv_bytes: int | None = None
    server_arguments: str = ""
    serial: bool = False
    stock_url: str | None = None
    eos_url: str | None = None
    served_name: str | None = None
    wait: float = 300.0

    def __post_init__(self) -> None:
        """Refuses what cannot be measured.

        Raises:
            SettingError: the first setting that is wrong.
        """
        for name in ("repeats", "repeats_close", "output_tokens", "system_characters", "long_characters"):
            at_least_one(name, getattr(self, name))
        if self.kv_bytes is not None:
            at_least_one("kv_bytes", self.kv_bytes)
        for name in _POSITIVE:
            above_zero(name, getattr(self, name), f"give {getattr(SweepOptions, name):g}")
        if self.window_most < self.seconds:
            remedy = "give as many seconds as the window has at least, or more"
            raise SettingError("window_most", self.window_most, f"it is below seconds={self.seconds:g}", remedy)
        if self.dtype not in DTYPE_BYTES:
            remedy = f"give one of {', '.join(DTYPE_BYTES)}"
            raise SettingError("dtype", self.dtype, "unknown type of weights and KV cache", remedy)
        if (self.stock_url is None) != (self.eos_url is None):
            name = "stock-url" if self.stock_url is None else "eos-url"
            raise SettingError(name, None, "one server alone compares nothing", "give both addresses")
        if self.stock_url is not None and self.served_name is None:
            raise SettingError("served-name", None, "it is missing", "name the model as both servers do")
        if self.restricted and self.given:
            raise SettingError("restricted", True, "there is no third address", "leave it out, or the addresses")
        if "long_text" in self.scenarios and not self.given and self.max_model_len < _LONGEST:
            remedy = f"give {_LONGEST} or more, or leave out long_text"
            raise SettingError("max-model-len", self.max_model_len, "a long_text request does not fit", remedy)

    @property
    def given(self) -> bool:
        """Whether somebody else runs the servers."""
        return self.stock_url is not None

    @property
    def settings(self) -> tuple[str, ...]:
        """Stock and all budgets, in the order in which they take turns and tables show them."""
        return (STOCK, *((RESTRICTED,) if self.restricted else ()), *map(str, self.budgets))

    @property
    def kv_requests(self) -> int:
        """Requests of full length for which the KV cache has room."""
        return max(_OPEN_LOOP_REQUESTS if load.rate is not None else load.concurrency for load in self.loads)

    def window_requests(self, scenario: str, load: Load) -> int:
        """Answers that a closed loop's window holds at least: a visit of each user of few, a share of them of many."""
        weights = SCENARIOS[scenario]
        length = sum(w * VISIT_LENGTHS.get(kind, 1) for kind, w in weights.items()) / sum(weights.values())
        visits = max(min(load.concurrency, _FEW), self.per_user * load.concurrency)
        return max(_LEAST_ANSWERS, math.ceil(visits * length))

    def arguments(self) -> tuple[str, ...]:
        """Flags of both servers beyond the sweep's own."""
        return tuple(shlex.split(self.server_arguments))

    def to_dict(self) -> dict[str, Any]:
        """What a cell's figures depend on, for the raw results; no path of the machine is in it, and no address.

        Lists of cells (budgets, scenarios, loads, repeats) are not: a folder may take more of them later.
        """
        return {
            "seconds": self.seconds,
            "per_user": self.per_user,
            "window_most": self.window_most,
            "ramp_most": self.ramp_most,
            "output_tokens": self.output_tokens,
            "output_length": "natural" if self.natural else "fixed",
            "prompt_characters": self.prompt_characters,
            "system_characters": self.system_characters,
            "long_characters": self.long_characters,
            "rows": "embedded benchmark, test split" if self.rows is None else _described(self.rows),
            "seed": self.seed,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "server_arguments": self.server_arguments,
            "serial": self.serial,
            "servers": "given" if self.given else "started by the sweep",
        }


def _described(rows: Path) -> str:
    try:
        return f"{rows.name}, sha256 {hashlib.sha256(rows.read_bytes()).hexdigest()[:16]}"
    except OSError as e:
        raise SettingError("rows", str(rows), f"it cannot be read ({e.strerror})", "name a JSONL file") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sweep's command line."""
    default = SweepOptions(Path())

    def option(group: Any, name: str, text: str) -> None:
        add_option(group, name, getattr(default, name), text)

    parser.add_argument("--out", type=Path, default=Path("runs/loadtest"), help="default: %(default)s")
    what = parser.add_argument_group("what is measured")
    what.add_argument("--budgets", default=",".join(map(str, default.budgets)), help="default: %(default)s")
    what.add_argument("--scenarios", default=",".join(default.scenarios), help="default: %(default)s")
    what.add_argument("--concurrency", default="1,8,24", help="users of the closed loop (default: %(default)s)")
    what.add_argument("--rates", default=None, help="visits/s of an open loop with Poisson arrivals, instead of users")
    what.add_argument("--restricted", action="store_true", help="stock without prefix caching and chunked prefill, too")
    option(what, "repeats", "of every cell")
    option(what, "repeats_close", "of settings whose figures are close to stock's")
    option(what, "minutes", "start no further repeat later; the first one is always measured")
    option(what, "seconds", "of a window at least")
    option(what, "per_user", "visits for each user that a window holds at least; one for each of the first 8")
    option(what, "window_most", "seconds of a window at most")
    option(what, "ramp_most", "seconds in front of a window at most")
    option(what, "seed", "of all draws")
    ask = parser.add_argument_group("what is asked")
    ask.add_argument("--rows", type=Path, default=None, help="JSONL of questions; default: the embedded benchmark")
    option(ask, "output_tokens", "of each answer")
    ask.add_argument("--natural", action="store_true", help="let answers end where the model ends them")
    option(ask, "prompt_characters", "0: as they are")
    option(ask, "system_characters", "of the shared system prompt")
    option(ask, "long_characters", "of the text in front of long_text questions")
    serve = parser.add_argument_group("who answers")
    option(serve, "preset", "random weights of this shape")
    serve.add_argument("--model", default=None, help="model directory instead")
    option(serve, "profile", "scaled to the model's depth")
    option(serve, "dtype", "of weights and KV cache")
    option(serve, "max_model_len", "longest prompt and answer in tokens")
    serve.add_argument("--kv-bytes", type=int, default=None, help="KV cache of each server (default: room for all)")
    serve.add_argument("--server-arguments", default="", help="further flags of both, e.g. '--load-format dummy'")
    serve.add_argument("--serial", action="store_true", help="one server at a time, where two don't fit")
    serve.add_argument("--stock-url", default=None, help="a running stock server, with --eos-url and --served-name")
    serve.add_argument("--eos-url", default=None)
    serve.add_argument("--served-name", default=None)
    option(serve, "wait", "seconds for given servers to become healthy")


def options_of(args: argparse.Namespace) -> SweepOptions:
    """The options of a parsed command line.

    Raises:
        SettingError: as :class:`SweepOptions` and the parsers of lists.
    """
    values = dict(vars(args))
    loads = parse_loads(values.pop("concurrency"), values.pop("rates"))
    values["budgets"] = parse_numbers("budgets", values["budgets"], "576,192,64")
    values["scenarios"] = parse_scenarios(values["scenarios"])
    values["prompt_characters"] = values["prompt_characters"] or None
    return SweepOptions(loads=loads, **values)
