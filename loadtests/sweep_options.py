"""What a sweep measures: its settings from the command line, checked, and as they stand in the raw results."""

import argparse
import hashlib
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eos_vllm.core.cost import DTYPE_BYTES
from eos_vllm.core.errors import SettingError
from loadtests.grid import Load, Phase, parse_budgets, parse_loads
from loadtests.settings import at_least_one, parse_weights, share

KV_PHASES = ("large", "bound")
ACCURACY = "accuracy"
# With the 19 tokens that LLaVA's template adds, 88 tokens of text: the prompt of the design's ceilings.
PROMPT_CHARACTERS = 69
CPU_ARGUMENTS = "--dtype float32 --enforce-eager"


@dataclass(frozen=True)
class SweepOptions:
    """All settings of a sweep; :func:`add_arguments` says what each means."""

    out: Path
    preset: str = "bench-88m"
    model: str | None = None
    profile: str = "sparsevlm-v2-llava-1.5-7b"
    budgets: tuple[int, ...] = (576, 192, 64, 16)
    loads: tuple[Load, ...] = (Load(3, 1), Load(12, 8), Load(24, 24))
    kv: tuple[str, ...] = KV_PHASES
    kv_bytes: dict[str, int] = field(default_factory=dict)
    bound_requests: float = 2.5
    repeats: int = 2
    minutes: float = 29.0
    output_tokens: int = 16
    natural: bool = False
    prompt_characters: int | None = PROMPT_CHARACTERS
    scenarios: dict[str, float] = field(default_factory=lambda: {"single": 1.0})
    repeat_share: float = 0.0
    rows: Path | None = None
    seed: int = 0
    dtype: str = "float32"
    block_size: int = 32
    max_model_len: int = 1024
    max_num_batched_tokens: int = 2816
    server_arguments: str = CPU_ARGUMENTS
    serial: bool = False
    stock_url: str | None = None
    eos_url: str | None = None
    served_name: str | None = None
    accuracy: bool = True
    accuracy_profile: str = "embedded-searched"
    accuracy_requests: int = 200
    accuracy_concurrency: int = 8

    def __post_init__(self) -> None:
        """Refuses what cannot be measured.

        Raises:
            SettingError: the first setting that is wrong.
        """
        for name in ("repeats", "output_tokens", "block_size", "accuracy_requests", "accuracy_concurrency"):
            at_least_one(name, getattr(self, name))
        share("repeat_share", self.repeat_share)
        if self.minutes <= 0:
            raise SettingError("minutes", self.minutes, "it must be above 0", "give 29, or more for more repeats")
        if self.bound_requests < 1:
            remedy = "give 1 or more stock requests that shall fit"
            raise SettingError("bound_requests", self.bound_requests, "not one request would fit", remedy)
        if self.dtype not in DTYPE_BYTES:
            remedy = f"give one of {', '.join(DTYPE_BYTES)}"
            raise SettingError("dtype", self.dtype, "unknown type of the KV cache", remedy)
        for phase in (*self.kv, *self.kv_bytes):
            if phase not in KV_PHASES:
                raise SettingError("kv", phase, "no such size", f"choose from {', '.join(KV_PHASES)}")
        if not self.kv:
            raise SettingError("kv", "", "nothing would be measured", f"choose from {', '.join(KV_PHASES)}")
        if (self.stock_url is None) != (self.eos_url is None):
            raise SettingError("stock-url", self.stock_url, "one server alone compares nothing", "give --eos-url too")
        if self.stock_url is not None and self.served_name is None:
            raise SettingError("served-name", None, "it is missing", "name the model as both servers do")
        if not set(self.scenarios) <= {"single"} and self.max_model_len < 2 * 576:
            problem = "two images or several turns do not fit"
            raise SettingError("max-model-len", self.max_model_len, problem, "give 2048, or scenarios single=1")

    @property
    def given(self) -> bool:
        """Whether somebody else runs the servers."""
        return self.stock_url is not None

    def phases(self) -> list[Phase]:
        """What is measured, in order. Servers that are given have the one KV cache that they have."""
        accuracy = Phase(ACCURACY, (Load(self.accuracy_requests, self.accuracy_concurrency),), 1)
        if self.given:
            return [Phase("given", self.loads, self.repeats)]
        speed = [Phase(name, self.loads, self.repeats) for name in self.kv]
        return [accuracy, *speed] if self.accuracy else speed

    def arguments(self) -> tuple[str, ...]:
        """Flags of both servers beyond the sweep's own."""
        return tuple(shlex.split(self.server_arguments))

    def to_dict(self) -> dict[str, Any]:
        """What figures depend on, for the raw results; no path of the machine is in it, and no address."""
        return {
            "budgets": list(self.budgets),
            "phases": [phase.to_dict() for phase in self.phases()],
            "output_tokens": self.output_tokens,
            "output_length": "natural" if self.natural else "fixed",
            "prompt_characters": self.prompt_characters,
            "scenarios": self.scenarios,
            "repeat_share": self.repeat_share,
            "rows": "embedded benchmark, test split" if self.rows is None else _described(self.rows),
            "seed": self.seed,
            "dtype": self.dtype,
            "block_size": self.block_size,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": self.max_num_batched_tokens,
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
    what = parser.add_argument_group("what is measured")
    what.add_argument("--budgets", default=",".join(map(str, default.budgets)), help="default: %(default)s")
    what.add_argument("--concurrency", default="1,8,24", help="users of the closed loop (default: %(default)s)")
    what.add_argument("--rates", default=None, help="visits/s of an open loop with Poisson arrivals, instead of users")
    what.add_argument("--requests", default="3,12,24", help="per cell, one for each load (default: %(default)s)")
    what.add_argument("--repeats", type=int, default=default.repeats, help="default: %(default)s")
    what.add_argument(
        "--minutes", type=float, default=default.minutes, help="skip repeats beyond (default: %(default)s)"
    )
    what.add_argument("--kv", default=",".join(KV_PHASES), help="KV cache sizes (default: %(default)s)")
    what.add_argument(
        "--bound-requests", type=float, default=default.bound_requests, help="stock requests that fit: %(default)s"
    )
    what.add_argument("--kv-bytes", default="", help="sizes instead of the computed ones, e.g. large=68719476736")
    what.add_argument("--seed", type=int, default=default.seed)
    what.add_argument("--no-accuracy", action="store_true", help="leave out the embedded model's answers")
    what.add_argument("--accuracy-profile", default=default.accuracy_profile)
    what.add_argument("--accuracy-requests", type=int, default=default.accuracy_requests, help="default: %(default)s")
    ask = parser.add_argument_group("what is asked")
    ask.add_argument("--rows", type=Path, default=None, help="JSONL of questions; default: the embedded benchmark")
    ask.add_argument("--scenarios", default="single=1", help="weights, e.g. single=3,several=1,text_only=1")
    ask.add_argument("--repeat-share", type=float, default=0.0, help="share of visits that show a known image")
    ask.add_argument("--output-tokens", type=int, default=default.output_tokens, help="default: %(default)s")
    ask.add_argument("--natural", action="store_true", help="let answers end where the model ends them")
    ask.add_argument(
        "--prompt-characters", type=int, default=PROMPT_CHARACTERS, help="0: as they are (default: %(default)s)"
    )
    serve = parser.add_argument_group("who answers")
    serve.add_argument("--preset", default=default.preset, help="random weights of this shape (default: %(default)s)")
    serve.add_argument("--model", default=None, help="model directory instead")
    serve.add_argument("--profile", default=default.profile, help="scaled to the model's depth (default: %(default)s)")
    serve.add_argument("--dtype", default=default.dtype, help="of the KV cache, for the plan (default: %(default)s)")
    serve.add_argument("--block-size", type=int, default=default.block_size)
    serve.add_argument("--max-model-len", type=int, default=default.max_model_len)
    serve.add_argument("--max-num-batched-tokens", type=int, default=default.max_num_batched_tokens)
    serve.add_argument("--server-arguments", default=CPU_ARGUMENTS, help="further flags of both (default: %(default)s)")
    serve.add_argument("--serial", action="store_true", help="one server at a time, where two don't fit")
    serve.add_argument("--stock-url", default=None, help="a running stock server, with --eos-url and --served-name")
    serve.add_argument("--eos-url", default=None)
    serve.add_argument("--served-name", default=None)


def options_of(args: argparse.Namespace) -> SweepOptions:
    """The options of a parsed command line.

    Raises:
        SettingError: as :class:`SweepOptions` and the parsers of lists.
    """
    return SweepOptions(
        out=args.out,
        preset=args.preset,
        model=args.model,
        profile=args.profile,
        budgets=parse_budgets(args.budgets),
        loads=parse_loads(args.concurrency, args.requests, args.rates),
        kv=tuple(part for part in args.kv.split(",") if part),
        kv_bytes={name: int(value) for name, value in parse_weights(args.kv_bytes).items()} if args.kv_bytes else {},
        bound_requests=args.bound_requests,
        repeats=args.repeats,
        minutes=args.minutes,
        output_tokens=args.output_tokens,
        natural=args.natural,
        prompt_characters=args.prompt_characters or None,
        scenarios=parse_weights(args.scenarios),
        repeat_share=args.repeat_share,
        rows=args.rows,
        seed=args.seed,
        dtype=args.dtype,
        block_size=args.block_size,
        max_model_len=args.max_model_len,
        max_num_batched_tokens=args.max_num_batched_tokens,
        server_arguments=args.server_arguments,
        serial=args.serial,
        stock_url=args.stock_url,
        eos_url=args.eos_url,
        served_name=args.served_name,
        accuracy=not args.no_accuracy,
        accuracy_profile=args.accuracy_profile,
        accuracy_requests=args.accuracy_requests,
    )
