"""What the benchmarks share: command line and raw results, the model and its profile, turns, ratios with intervals.

Run them from the project's root, ``python -m benchmarks.<name>``; with ``--table FILE`` each prints the table of a raw
result again.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from eos_vllm import profiles
from eos_vllm.analysis.scaling import scale_to_model
from eos_vllm.core.profile import Profile
from eos_vllm.models.geometry import geometry
from eos_vllm.models.images import sample_image
from eos_vllm.models.tiny import write_tiny_model

PROFILE = "sparsevlm-v2-llava-1.5-7b"
# Pairs of turns whose times don't count.
_WARM_UP = 2
_T = TypeVar("_T")


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's text as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def parse(parser: argparse.ArgumentParser, out: Path | None = None) -> argparse.Namespace:
    """The command line, ``--out`` and ``--table`` included; ``out`` is where a raw result goes if nothing is said."""
    parser.add_argument("--out", type=Path, default=out, help="file of the raw result")
    parser.add_argument("--table", type=Path, default=None, help="print the table of this result, and measure nothing")
    return parser.parse_args()


def run(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
) -> int:
    """Measures and writes, or reads, a raw result and prints its table; returns 0."""
    args = parse(parser)
    if args.table:
        result = read(args.table)
    else:
        result = measure(args)
        if args.out:
            write(args.out, result)
    print(table(result))
    return 0


def read(file: Path) -> dict[str, Any]:
    """A raw result."""
    return json.loads(file.read_text(encoding="utf-8"))


def write(file: Path, result: dict[str, Any]) -> None:
    """Keeps a raw result."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def quiet_engines(**more: str) -> None:
    """Engines shall be quiet, unless the environment says otherwise; ``more`` are variables."""
    for name, value in {"VLLM_LOGGING_LEVEL": "ERROR", **more}.items():
        os.environ.setdefault(name, value)


def engines_in_process(**more: str) -> None:
    """Engines shall run in this process and be quiet, unless the environment says otherwise; ``more`` are variables."""
    quiet_engines(VLLM_ENABLE_V1_MULTIPROCESSING="0", **more)


@contextmanager
def random_model(shape: Any) -> Iterator[Path]:
    """The directory of a model with random weights, for the length of a ``with`` block."""
    with tempfile.TemporaryDirectory(prefix="eos-bench-") as folder:
        yield write_tiny_model(Path(folder) / "model", shape=shape)


def scaled_profile(model: Path) -> Profile:
    """SparseVLM v2's schedules on this model's depth."""
    shape = geometry(model)
    return scale_to_model(profiles.load(PROFILE), shape.num_decoder_layers, shape.visual_tokens)


def prompt(asked: str, number: int) -> dict[str, Any]:
    """vLLM's form of a question about the made-up image of this number."""
    return {"prompt": f"USER: <image>\n{asked} ASSISTANT:", "multi_modal_data": {"image": sample_image(number)}}


def turns(cases: Sequence[_T], pairs: int) -> Iterator[tuple[int, _T, bool]]:
    """Every case once for each pair, there and back in turn: number of the pair, case, and whether its time counts."""
    for pair in range(pairs + _WARM_UP):
        for case in cases if pair % 2 else reversed(cases):
            yield pair, case, pair >= _WARM_UP


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Geometric mean of ours over theirs, taken at the same time, with its 95 % interval."""
    logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    mean, wide = statistics.mean(logs), 1.96 * statistics.stdev(logs) / math.sqrt(len(logs))
    return {"ratio": math.exp(mean), "low": math.exp(mean - wide), "high": math.exp(mean + wide)}


def shown(middle: float, low: float, high: float, digits: int = 3) -> str:
    """A figure with its range."""
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
