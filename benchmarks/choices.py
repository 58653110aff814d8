"""Condenses committed raw results into what the page and ``eos-vllm advise`` know of accuracy, cost and speed.

    python -m benchmarks.choices  # results/... to eos_vllm/page/data/choices.json

Nothing is measured here: every figure is a raw result's own, or computed from the replies and rounds that it keeps. The
same results give the same bytes. A profile that does something else today than when it was measured is refused.
"""

import hashlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.equal_cost import all_profiles
from eos_search.accuracy import AVERAGE, Share, accuracy, relative
from eos_search.answerers import STOCK
from eos_search.raw import behaviour, digest, fingerprint, weights_digest
from eos_vllm import profiles
from eos_vllm.analysis.choices import FILE, SCHEMA, acts, parse_choices
from eos_vllm.cluttervqa import Row
from eos_vllm.cluttervqa.dataset import rows_of, samples
from eos_vllm.core.budget import layer_average
from eos_vllm.core.errors import EosError
from eos_vllm.core.plan import Planner
from eos_vllm.core.profile import Profile, parse_profile
from eos_vllm.models import embedded
from eos_vllm.provenance import machine_line
from loadtests.results import Results

EQUAL_COST, ACCURACY, LOAD_TESTS = "results/equal-cost.json", "results/embedded-accuracy.json", "results/loadtest-cpu"
MODEL, SPLIT = "embedded", "test"
COUNTING = "counting"
_AGAIN = "measure it again, or restore the profile"


def row(data: dict[str, Any], image: str) -> Row:
    """A question as marking needs it."""
    return Row(data["id"], data["kind"], data.get("prompt", ""), data["answer"], (Path(image),), ())


def benchmark_rows(images: int) -> list[Row]:
    """The questions about the first images of ClutterVQA's test split, as ``benchmarks/equal_cost.py`` asks them."""
    return [row(data, data["image_files"][0]) for s in samples(SPLIT, images) for data in rows_of(s)]


def shares(rows: Sequence[Row], case: dict[str, Any]) -> dict[str, Any]:
    """Accuracy with and without questions that count.

    Raises:
        EosError: marking the replies again gives another accuracy than the result holds.
    """
    found = accuracy(rows, case["replies"])[AVERAGE]
    if found != Share(**case["accuracy"][AVERAGE]):
        problem = "its replies marked again give another accuracy than it holds"
        raise EosError("result", case["profile"], problem, "measure it again")
    others = [(r, reply) for r, reply in zip(rows, case["replies"], strict=True) if r.kind != COUNTING]
    rest = accuracy([r for r, _ in others], [reply for _, reply in others])[AVERAGE]
    return {
        "accuracy": interval(found),
        "without_counting": rest.value,
        "without_counting_interval": [rest.low, rest.high],
    }


def interval(share: Share) -> dict[str, Any]:
    """A share as the data has it."""
    return {"mean": share.value, "low": share.low, "high": share.high, "questions": share.questions}


def rounds(values: Sequence[float]) -> dict[str, Any]:
    """Requests per second over some rounds."""
    return {"value": statistics.mean(values), "low": min(values), "high": max(values), "rounds": len(values)}


def point(
    rows: Sequence[Row],
    case: dict[str, Any],
    stock: dict[str, Any],
    profile: Profile,
    speed: dict[str, Any] | None,
    source: str,
) -> dict[str, Any]:
    """A case of a raw result as a point.

    Raises:
        EosError: the profile is not what was measured.
    """
    counts = Planner(profile).counts(case["budget"])
    if digest(profile) != case["does"] or list(counts) != case["kept"]:
        problem = f"it does something else today than when {source} was measured"
        raise EosError("profile", case["profile"], problem, _AGAIN)
    cost = layer_average(profile, counts)
    ours = None if speed is None else speed["requests_per_second"][str(case["budget"])]
    return {
        "model": MODEL,
        "profile": case["profile"],
        "does": case["does"],
        "shipped": shipped(profile),
        "measure": profile.budget.measure,
        "budget": case["budget"],
        "counts": list(counts),
        "layer_average": cost,
        "kv_share": cost / embedded.SHAPE.visual_tokens,
        **shares(rows, case),
        "relative": interval(relative(rows, case["replies"], stock["replies"])),
        "requests_per_second": ours and rounds(ours),
        "stock_ratio": ours and statistics.mean(ours) / statistics.mean(speed["stock"]),  # type: ignore[index]
        "stock_ratio_range": ours and [min(ours) / max(speed["stock"]), max(ours) / min(speed["stock"])],  # type: ignore[index]
        "source": source,
    }


def as_schema_1(profile: Profile) -> Profile:
    """A shipped profile as it was when accuracy was first measured: all later text of the prompt asks.

    Of single questions, which is all that was asked, windows of kind ``turn`` keep the very same tokens.
    """
    data = profile.to_dict() | {"schema": "eos-profile/1"}
    for part, later in (("importance", "window"), ("importance", "reduce"), ("operator", "aggregate")):
        data[part].pop(later, None)
    return parse_profile(data, profile.name)


def shipped(profile: Profile) -> str | None:
    """Name of the shipped profile that does the same and measures budgets by the same, if there is one."""
    for name in profiles.names():
        other = profiles.load(name)
        same = (other.budget.measure, other.budget.minimum) == (profile.budget.measure, profile.budget.minimum)
        if same and other.schedules == profile.schedules and acts(other) == acts(profile):
            return name
    return None


def points(
    raw: dict[str, Any], rows: Sequence[Row], known: dict[str, Profile], source: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All tokens, and all cases of profiles that are ``known``, of one raw result."""
    stock = next(case for case in raw["cases"] if case["profile"] == STOCK)
    speeds = {entry["profile"]: entry for entry in raw.get("speed", ())}
    head = {"model": MODEL, "visual_tokens": embedded.SHAPE.visual_tokens, **shares(rows, stock), "source": source}
    return head, [
        point(rows, case, stock, known[case["profile"]], speeds.get(case["profile"]), source)
        for case in raw["cases"]
        if case["profile"] in known
    ]


def load_tests(folder: Path, source: str) -> list[dict[str, Any]]:
    """Every budget in every scenario under every load of a sweep, against stock."""
    results, found = Results(folder), []
    subject = results.settings["subject"]
    for comparison in results.comparisons:
        if comparison.question is not None:
            continue
        group = results.group(comparison.scenario, comparison.load, comparison.setting)
        assert group is not None  # it was compared
        rates = [cell.requests_per_second for cell in group.cells]
        ratio = comparison.ratio
        found.append(
            {
                "model": subject["name"],
                "profile": subject["profile_name"],
                "budget": int(comparison.setting),
                "scenario": comparison.scenario,
                "users": comparison.load.concurrency,
                "requests_per_second": rounds(rates),
                "stock_ratio": ratio.mean,
                "stock_ratio_interval": None if ratio.low is None else [ratio.low, ratio.high],
                "verdict": ratio.verdict,
                "source": source,
            }
        )
    return found


def origin(root: Path, file: str, facts: dict[str, Any], about: str, measured_at: dict[str, str]) -> dict[str, Any]:
    """Where figures are from."""
    path = root / file
    if path.is_dir():
        lines = [f"{p.relative_to(path).as_posix()} {sha256(p)}\n" for p in sorted(path.rglob("*.json"))]
        mark = hashlib.sha256("".join(lines).encode()).hexdigest()
    else:
        mark = sha256(path)
    return {
        **{"file": file, "sha256": mark, "git": facts["git"], "created": facts["created"]},
        **{"machine": machine_line(facts), "measured_at": measured_at, "about": about},
    }


def sha256(path: Path) -> str:
    """Digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def condense(root: Path) -> str:
    """The data as text, from the raw results below ``root``.

    Raises:
        EosError: a result that is not of today's model, questions or profiles.
    """
    equal, wide = (json.loads((root / file).read_text(encoding="utf-8")) for file in (EQUAL_COST, ACCURACY))
    weights = weights_digest(embedded.path())
    if weights is None or weights != wide["weights"]:
        raise EosError("weights", wide["weights"], f"the embedded model is {weights} today", "make accuracy")
    known = all_profiles()
    own = {
        name: as_schema_1(profiles.load(name))
        for name in {case["profile"] for case in wide["cases"]} & {*profiles.names()}
    }
    wide_rows = [row(data, data["image"]) for data in wide["rows"]]
    if len(wide_rows) != len(wide["cases"][0]["replies"]):
        raise EosError("rows", len(wide_rows), f"{ACCURACY} holds another number of replies", "make accuracy")
    baselines, found, used = [], [], {}
    for raw, rows, these, source in (
        (equal, benchmark_rows(equal["images"]), known, EQUAL_COST),
        (wide, wide_rows, own, ACCURACY),
    ):
        baseline, some = points(raw, rows, these, source)
        baselines.append(baseline)
        found += some
        used |= {p["does"]: behaviour(these[p["profile"]]) | {"name": p["profile"]} for p in some}
    sweep = json.loads((root / LOAD_TESTS / "sweep.json").read_text(encoding="utf-8"))
    sessions = [s["provenance"] for s in sweep["sessions"]]
    questions = fingerprint(benchmark_rows(equal["images"]))
    return render(
        {
            "schema": SCHEMA,
            "model": MODEL,
            "source": f"{EQUAL_COST}, {ACCURACY}",
            "visual_tokens": embedded.SHAPE.visual_tokens,
            "weights": weights,
            "origin": [
                origin(root, EQUAL_COST, equal["provenance"], _about(equal, questions), equal["measured_at"]),
                origin(root, ACCURACY, wide["provenance"], _about_wide(wide), {}),
                origin(
                    root,
                    LOAD_TESTS,
                    sessions[0],
                    "stock and eos in turns over HTTP; random weights, so there is no accuracy",
                    {s["created"]: s["git"] for s in sessions},
                ),
            ],
            "baselines": baselines,
            "points": found,
            "load_tests": load_tests(root / LOAD_TESTS, LOAD_TESTS),
            "profiles": used,
        }
    )


def _about(equal: dict[str, Any], questions: str) -> str:
    return (
        f"{equal['questions']} questions about {equal['images']} images of ClutterVQA's {SPLIT} split ({questions}); "
        "accuracy by the reference with exact counts; requests/s of offline vLLM with exact counts in float32, single "
        "questions at once"
    )


def _about_wide(wide: dict[str, Any]) -> str:
    return (
        f"{len(wide['rows'])} questions about {wide['benchmark']['images']} images of {wide['benchmark']['source']} "
        f"({wide['fingerprint']}); accuracy by the {wide['through']} with exact counts; speed was not measured"
    )


def render(data: dict[str, Any]) -> str:
    """JSON with a line for each point, so that changes can be read; checked against what readers expect."""

    def line(value: Any) -> str:
        return json.dumps(rounded(value), ensure_ascii=False)

    parts = []
    for key, value in data.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(f"  {line(item)}" for item in value) + "\n ]"
        elif isinstance(value, dict):
            # Profiles: rounded, they would no longer be what was measured.
            text = "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "\n }"
        else:
            text = line(value)
        parts.append(f" {json.dumps(key)}: {text}")
    text = "{\n" + ",\n".join(parts) + "\n}\n"
    parse_choices(text)
    return text


def rounded(value: Any) -> Any:
    """Floats to six places, more than any of them is good for, so that machines agree to the byte."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return {k: rounded(v) for k, v in value.items()} if isinstance(value, dict) else value


def main() -> int:
    """Writes the file; returns 0."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--root", type=Path, default=Path("."), help="where results/ is (default: here)")
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    args.out.write_text(condense(args.root), encoding="utf-8")
    print(args.out.name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
