"""Every selector and shipped profile of the embedded model at equal cost: accuracy, and requests per second, of each.

    python -m benchmarks.equal_cost --out results/equal-cost.json  # accuracy (half an hour), then speed

Cost is the layer average: visual tokens that a decoder layer caches, on average over layers. Accuracy is that of the
Hugging Face reference; speed is that of vLLM answering the same questions, one model and one profile per row. Counts
are exact (`--eos-exact-counts`): rounded to KV blocks, costs would no longer be equal. What was stopped goes on with
the same command.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.engine_speed import REQUESTS, pairs, speeds
from eos_search.accuracy import AVERAGE, Share, difference
from eos_search.answerers import STOCK, Case, ReferenceAnswerer
from eos_search.evaluation import evaluate
from eos_vllm import profiles
from eos_vllm.analysis.comparison import measured_by
from eos_vllm.cluttervqa import Row, read_rows
from eos_vllm.cluttervqa.dataset import export
from eos_vllm.core.budget import kept_counts
from eos_vllm.core.errors import BudgetError
from eos_vllm.core.profile import Profile, parse_profile
from eos_vllm.core.selectors import SELECTORS
from eos_vllm.models import embedded
from eos_vllm.models.geometry import geometry
from eos_vllm.provenance import machine_line
from loadtests.origin import origin

COSTS = (256, 192, 128, 64, 32, 16)
# Selectors whose defaults are LLaVA-1.5's, or which one score does not describe.
RULES: dict[str, dict[str, Any]] = {
    **{rule: {"rule": rule} for rule in SELECTORS if rule not in ("topk", "window_topk")},
    "window_topk": {"rule": "window_topk", "shallow_layer": 0},
    "topk cls_attention": {"rule": "topk", "score": "cls_attention"},
    "topk received_attention": {"rule": "topk", "score": "received_attention"},
    "topk rarity": {"rule": "topk", "score": "rarity"},
    "coverage uniform": {"rule": "coverage", "score": "uniform"},
    "mmr rarity": {"rule": "mmr", "score": "rarity"},
}


def selector_profile(name: str, select: dict[str, Any]) -> Profile:
    """A profile of one selector before the decoder and nothing else."""
    prune = {"gate": 1.0, "discard": 0.8, "gamma": 0.0, "tau": 1.0, "theta": 0.0, "rho": 0.0, "nu": 0.0}
    model = {"architecture": "LlavaForConditionalGeneration", "num_decoder_layers": 8, "visual_tokens": 576}
    return parse_profile(
        {
            "schema": "eos-profile/2",
            "name": name,
            "model": model,
            "reducers": [{"layer": -1, "select": select, **prune}],
            "budget": {"measure": "layer_average", "tokens": 64},
        }
    )


def all_profiles() -> dict[str, Profile]:
    """Selectors alone, then the shipped profiles of the embedded model with budgets read as costs."""
    found = {name: selector_profile(name, select) for name, select in RULES.items()}
    sizes = geometry(str(embedded.path()))
    alone = {p.selector for p in found.values()}
    for name in profiles.names():
        profile = profiles.load(name)
        if not name.startswith("embedded-") or (not profile.inside and profile.selector in alone):
            continue
        found[name] = measured_by(profile, "layer_average", sizes)
    return found


def reachable(profile: Profile) -> list[int]:
    """Costs that the profile's layers can meet."""
    costs = []
    for cost in COSTS:
        try:
            kept_counts(profile, cost)
        except BudgetError:
            continue
        costs.append(cost)
    return costs


def measure_accuracy(result: dict[str, Any], rows: list[Row], save: Any) -> None:
    """Adds what is missing of the accuracies, a profile at a time."""
    answerer = ReferenceAnswerer(embedded.path())
    try:
        named: dict[str, list[Case]] = {STOCK: [Case(STOCK, None, None)]}
        for name, profile in all_profiles().items():
            named[name] = [Case(name, profile, cost) for cost in reachable(profile)]
        for name, cases in named.items():
            have = {(c["profile"], c["budget"]) for c in result["cases"]}
            missing = [c for c in cases if (c.name, c.budget) not in have]
            if not missing:
                continue
            start = time.monotonic()
            found = evaluate(answerer, rows, missing, lambda _: lambda _n: None)
            result["cases"] += found
            save()
            print(f"{name}: {len(missing)} costs, {time.monotonic() - start:.0f} s", flush=True)
    finally:
        answerer.close()


def measure_speed(result: dict[str, Any], rows: list[Row], save: Any) -> None:
    """Adds what is missing of the speeds."""
    have = {entry["profile"] for entry in result["speed"]}
    every = ((name, profile, reachable(profile)) for name, profile in all_profiles().items() if name not in have)
    for entry in speeds(embedded.path(), rows, (one for one in every if one[2])):
        result["speed"].append(entry)
        save()
        stock, ours = statistics.mean(entry["stock"]), entry["requests_per_second"]
        print(f"{entry['profile']}: stock {stock:.1f}, ours {ours}", flush=True)


def table(result: dict[str, Any]) -> str:
    """Tables as Markdown: average accuracy and speed over stock's by cost, then accuracy by kind at each cost."""
    cases = {(c["profile"], c["budget"]): c for c in result["cases"]}
    names = list(dict.fromkeys(c["profile"] for c in result["cases"] if c["profile"] != STOCK))
    speeds = {entry["profile"]: pairs(entry) for entry in result["speed"]}
    stock = Share(**cases[STOCK, None]["accuracy"][AVERAGE])
    lines = [
        f"Unreduced: {stock} at 576.",
        "",
        "| profile | " + " | ".join(f"{cost}" for cost in COSTS) + " |",
        "| --- |" + " --- |" * len(COSTS),
    ]
    for name in names:
        cells = []
        for cost in COSTS:
            case = cases.get((name, cost))
            if case is None:
                cells.append("-")
                continue
            cell = str(Share(**case["accuracy"][AVERAGE]))
            if name in speeds:
                ours, stock_beside = map(statistics.mean, speeds[name][cost])
                cell += f"; {ours / stock_beside:.2f}x"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    kinds = [kind for kind in cases[STOCK, None]["accuracy"] if kind != AVERAGE]
    for cost in COSTS:
        lines += ["", f"| at {cost} | " + " | ".join(kinds) + " |", "| --- |" + " --- |" * len(kinds)]
        for name in (STOCK, *names):
            if case := cases.get((name, None if name == STOCK else cost)):
                shares = (Share(**case["accuracy"][kind]) for kind in kinds)
                lines.append(f"| {name} | " + " | ".join(map(str, shares)) + " |")
    return "\n".join(lines)


_PAGE = """\
# Selectors and profiles at equal cost

The embedded model, {questions} questions about {images} images of ClutterVQA's test split, greedy. Cost is the layer
average: visual tokens that a decoder layer caches, on average over layers; it is also the share of stock's visual KV.
Percent of right answers, the six kinds weighing alike, with 95 % intervals by bootstrap over images; behind the
semicolon requests per second over stock's, of the same profile in vLLM with its own defaults (float32, {requests}
single questions at once, between two engines of stock or in turns with one). Counts are exact
(`--eos-exact-counts`). A dash: the profile's layers cannot meet that cost. Drawn by

```
python -m benchmarks.equal_cost --table {raw} --page {page}
```

from the raw result, which keeps every reply. Measured at commits: {commit}; on {machine}.

What a name without `embedded-` stands for is that selector before the decoder and nothing else (`gamma` 0). **The
embedded model's CLS token was never trained**: `topk cls_attention` (FasterVLM), `visionzip`, `window_topk`,
`visprune`, `coverage` and `prumerge_plus` read noise there, and their rows say nothing of these methods on a CLIP
tower. Nor did it ever see a smaller picture: `resize` has no chance here. `coverage` picks one patch a step, each over
all pairs of patches, which takes longer than all of so small a model: `embedded-shared-image` and
`embedded-two-stage`, which begin with it and keep more than their average, are slower than stock down to 64 tokens.
Its share of larger models' time is in `results/selector-time-cpu.json`.

"""


def page(result: dict[str, Any], rows: list[Row], raw: Path, file: Path) -> str:
    """``docs/equal-cost.md``: the tables, and what each profile has over every n-th patch, paired."""
    text = _PAGE.format(
        questions=result["questions"],
        images=result["images"],
        requests=REQUESTS,
        raw=raw,
        page=file,
        commit="; ".join(f"{what} {commit}" for what, commit in result["measured_at"].items()),
        machine=machine_line(result["provenance"]),
    )
    cases = {(c["profile"], c["budget"]): c for c in result["cases"]}
    lines = [
        "## Against every n-th patch",
        "",
        "Points above `uniform` at the same cost, paired over images. About twenty rules on one test split: the",
        "largest of them is the largest after the fact.",
        "",
        "| profile | " + " | ".join(map(str, COSTS)) + " |",
        "| --- |" + " --- |" * len(COSTS),
    ]
    for name in dict.fromkeys(c["profile"] for c in result["cases"]):
        if name in (STOCK, "uniform"):
            continue
        cells = []
        for cost in COSTS:
            if (name, cost) not in cases:
                cells.append("-")
                continue
            found = difference(rows, cases[name, cost]["replies"], cases["uniform", cost]["replies"])
            cells.append(str(found[AVERAGE]))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return text + table(result) + "\n\n" + "\n".join(lines) + "\n"


def main() -> int:
    """Measures what is missing, or prints a table; returns 0."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--page", type=Path, default=None, help="with --table: write docs/equal-cost.md to this file")
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--only", choices=("accuracy", "speed"), default=None)
    args = common.parse(parser, out=Path("results/equal-cost.json"))
    if args.table:
        result = common.read(args.table)
        if args.page is None:
            print(table(result))
            return 0
        with tempfile.TemporaryDirectory(prefix="eos-equal-") as folder:
            rows = read_rows(export(Path(folder) / "rows", "test", result["images"]))
            args.page.write_text(page(result, rows, args.table, args.page))
        return 0
    common.quiet_engines()
    result: dict[str, Any] = {"provenance": origin(seed=0), "images": args.images, "cases": [], "speed": []}
    if args.out.exists():
        result = common.read(args.out)

    def save() -> None:
        common.write(args.out, result)

    with tempfile.TemporaryDirectory(prefix="eos-equal-") as folder:
        rows = read_rows(export(Path(folder) / "rows", "test", args.images))
        result["questions"] = len(rows)
        now = origin(seed=0)["git"]
        if args.only != "speed":
            result.setdefault("measured_at", {}).setdefault("accuracy", now)
            measure_accuracy(result, rows, save)
        if args.only != "accuracy":
            result.setdefault("measured_at", {}).setdefault("speed", now)
            measure_speed(result, rows, save)
    print(table(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
