"""``eos-vllm demo``: a real server with a profile on the embedded model, asked real questions over HTTP.

The questions are ClutterVQA's, of its test split: the model has never seen them, and the truth is known.
"""

import argparse
import http.client
import itertools
import sys
import tempfile
import time
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import eos_vllm
from eos_vllm import profiles
from eos_vllm.cli.server_process import Server, ServerError, log_tail, serve
from eos_vllm.cluttervqa import KINDS, Question, Sample, is_right, make_sample
from eos_vllm.core.budget import REQUEST_FIELD, image_size, own_budget, tokens_of
from eos_vllm.core.errors import EosError
from eos_vllm.core.plan import ImageSpan, Planner
from eos_vllm.core.profile import Profile
from eos_vllm.models.images import to_data_url

PROFILE = "embedded-searched"
QUESTIONS = 10
LEAST_RIGHT = 9
STOCK = "stock"
_ANSWER_TOKENS = 4


@dataclass(frozen=True)
class Row:
    """One line of the demo's table."""

    question: str
    budget: str  # name of the budget that was asked for, and its tokens where the request names them
    answer: str
    truth: str
    tokens: tuple[int, ...]
    kv_bytes: int
    milliseconds: float

    @property
    def right(self) -> bool:
        """Whether the answer is the truth."""
        return is_right(self.answer, self.truth)

    @property
    def stock(self) -> bool:
        """Whether it was asked at stock budget; a profile may keep everything, too."""
        return self.budget.split(" ")[0] == STOCK


def add_parser(subparsers: Any) -> None:
    """Registers ``demo``."""
    parser = subparsers.add_parser("demo", help="serve a small model with and without a profile, and compare")
    parser.add_argument("--profile", default=PROFILE, help="shipped profile to serve (default: %(default)s)")
    parser.add_argument("--keep-log", type=Path, default=None, help="file that takes the server's log")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the demo; 0 if all was answered, all budgets held and stock answers were right, else 1.

    Raises:
        EosError: no client to ask with, no such profile, or no model.
    """
    try:
        from openai import OpenAIError
    except ImportError as e:
        remedy = "install the extra: pip install 'eos-vllm[serve]'"
        raise EosError("package", "openai", "is not installed", remedy) from e
    from eos_vllm.models import embedded
    from eos_vllm.models.geometry import geometry

    profile = profiles.load(args.profile)
    model = embedded.path()
    with tempfile.TemporaryDirectory(prefix="eos-demo-") as folder:
        log = args.keep_log or Path(folder) / "server.log"
        shape = geometry(model)
        token_bytes = 2 * shape.num_kv_heads * shape.head_dim * 4
        flags = ["--eos-profile", args.profile, "--dtype", "float32", "--enforce-eager", "--max-model-len", "2048"]
        flags += ["--kv-cache-memory-bytes", str(128 << 20), "--served-model-name", "embedded", "--block-size", "32"]
        print(f"vllm serve {shown(model)} {' '.join(flags)}", flush=True)
        start = time.monotonic()
        try:
            with serve(model, flags, log, {"VLLM_LOGGING_LEVEL": "INFO"}) as server:
                print(f"healthy after {time.monotonic() - start:.0f} s; asking", flush=True)
                rows = ask_all(server, profile, token_bytes)
                metrics = server.text("/metrics")
        except ServerError as e:
            print(f"eos-vllm demo: {e}", file=sys.stderr)
            return 1
        except (OpenAIError, http.client.HTTPException, urllib.error.URLError, ConnectionError, TimeoutError) as e:
            said = " ".join(str(e).split())
            print(f"eos-vllm demo: the server did not answer ({type(e).__name__}: {said})", file=sys.stderr)
            print(log_tail(log), file=sys.stderr)
            return 1
        print_table(rows, image_size(profile) * profile.model.num_decoder_layers * token_bytes)
        for line in log.read_text(errors="replace").splitlines():
            if "eos: profile" in line:
                print("\nThe server said: " + line[line.index("eos: profile") :])
        failures = check(rows, profile, metrics)
        for failure in failures:
            print(f"eos-vllm demo: {failure}", file=sys.stderr)
        if failures:
            print(log_tail(log), file=sys.stderr)
            return 1
    print(f"\nall {len(rows)} requests answered, all budgets held")
    return 0


def shown(model: Path) -> Path:
    """The model's directory as ``vllm serve`` finds it from here: short in the project's folder, else in full."""
    project = Path(eos_vllm.__file__).resolve().parents[1]
    inside = model.resolve().is_relative_to(project) and Path.cwd() == project
    return model.resolve().relative_to(project) if inside else model


def ask_all(server: Server, profile: Profile, token_bytes: int) -> list[Row]:
    """Asks each question at stock budget, at the profile's, and at a quarter of it for that request alone."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)
    planner, total = Planner(profile, block=32), image_size(profile)
    budgets = {STOCK: total, "profile": None, "request": max(1, int(tokens_of(own_budget(profile), total)) // 4)}
    rows = []
    for sample, question in questions():
        image = {"type": "image_url", "image_url": {"url": to_data_url(sample.image)}}
        messages: Any = [{"role": "user", "content": [image, {"type": "text", "text": question.text}]}]
        for label, budget in budgets.items():
            extra = {} if budget is None else {"vllm_xargs": {REQUEST_FIELD: budget}}
            start = time.monotonic()
            reply = client.chat.completions.create(
                model="embedded",
                messages=messages,
                max_tokens=_ANSWER_TOKENS,
                temperature=0,
                extra_body=extra,
            )
            elapsed = (time.monotonic() - start) * 1000
            entering = planner.image_tokens(budget)
            kept = planner.plan(range(entering + 1), [ImageSpan(0, entering)], budget).kept[0]
            held = sum(n * k for n, k in zip(profile.segment_layers(), kept, strict=True)) * token_bytes
            name = label if budget is None else f"{label} ({budget})"
            text, shown = reply.choices[0].message.content or "", question.text.replace("\n", " ")
            rows.append(Row(shown, name, text, question.answer, kept, held, elapsed))
    return rows


def questions() -> list[tuple[Sample, Question]]:
    """The demo's questions, each about another image; the kinds take turns."""
    found: list[tuple[Sample, Question]] = []
    numbers = itertools.count()
    while len(found) < QUESTIONS:
        sample = make_sample("test", next(numbers), questions=1, kinds=(KINDS[len(found) % len(KINDS)],))
        found += [(sample, question) for question in sample.questions]
    return found


def print_table(rows: list[Row], stock_bytes: int) -> None:
    """Prints what was asked, answered, kept and how long it took."""
    width = max(len(row.question) for row in rows)
    head = f"{'question':{width}} {'budget':13} {'visual tokens':17} {'KV/image: stock':>15} {'eos':>8} {'ms':>5}"
    print(f"\n{head}  {'answer':9} truth")
    for row in rows:
        kept = "->".join(map(str, row.tokens))
        print(
            f"{row.question:{width}} {row.budget:13} {kept:17} {stock_bytes / 2**20:11.2f} MiB "
            f"{row.kv_bytes / 2**20:4.2f} MiB {row.milliseconds:5.0f}  {row.answer.strip():9} {row.truth:9} "
            f"{'' if row.right else 'WRONG'}".rstrip()
        )
    print()
    for budget in dict.fromkeys(row.budget for row in rows):
        asked = [row for row in rows if row.budget == budget]
        print(f"{budget:13} {sum(row.right for row in asked)} of {len(asked)} right")


def check(rows: list[Row], profile: Profile, metrics: str) -> list[str]:
    """What went wrong, if anything: no answers, wrong ones without reduction, or tokens kept that the plan didn't."""
    failures = [f"{row.question!r} at {row.budget}: no answer" for row in rows if not row.answer]
    right = sum(row.right for row in rows if row.stock)
    if right < LEAST_RIGHT:
        failures.append(f"of {QUESTIONS} answers at stock budget {right} are right, at least {LEAST_RIGHT} should be")
    for i, layer in enumerate(profile.layers):
        reduced = [row for row in rows if row.tokens[-1] < row.tokens[0]]
        want = sum(row.tokens[i + 1] for row in reduced)
        have = counter(metrics, "eos_visual_tokens_kept_total", f'layer="{layer}"')
        if have != want:
            failures.append(f"after layer {layer} {want} visual tokens should be left, /metrics says {have}")
    return failures


def counter(metrics: str, name: str, label: str = "") -> float | None:
    """Value of a counter in Prometheus' text form, None if it is not there."""
    for line in metrics.splitlines():
        if line.startswith(name) and label in line:
            return float(line.rsplit(" ", 1)[1])
    return None
