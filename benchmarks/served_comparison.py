"""What a comparison's profiles are worth served: requests per second of each beside its own accuracy at the same cost.

    python -m benchmarks.served_comparison --comparison results/comparison.json --out results/comparison-served.json
    python -m benchmarks.served_comparison --table results/comparison-served.json --figure docs/comparison-served.png

Accuracy is that of ``eos-search compare`` (Hugging Face, the test split); speed is that of vLLM with the very profile,
single questions at once, counts exact, in turns with an engine of stock with its own defaults. What was stopped goes
on with the same command.
"""

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import common
from benchmarks.engine_speed import REPEATS, REQUESTS, pairs, speeds
from eos_search.accuracy import AVERAGE, Share
from eos_search.answerers import STOCK
from eos_search.plots.canvas import MARKS, STYLE, panels, save
from eos_search.raw import digest, weights_digest
from eos_vllm.cluttervqa import export, read_rows
from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import parse_profile
from eos_vllm.models import embedded
from loadtests.origin import origin

# Images that the questions of a round are about.
_IMAGES = 60


def begin(comparison: Mapping[str, Any]) -> dict[str, Any]:
    """A result without speeds: what is to be served, and how well it answers."""
    cases = {(case["profile"], case["does"], case["budget"]): case["accuracy"][AVERAGE] for case in comparison["cases"]}
    stock = next(case for case in comparison["cases"] if case["profile"] == STOCK)
    profiles = [
        {
            **{name: run[name] for name in ("profile", "does", "method", "seed", "theta")},
            "accuracy": {str(cost): cases[run["profile"], run["does"], cost] for cost in run["costs"]},
        }
        for run in comparison["runs"]
    ]
    return {
        "provenance": origin(seed=0),
        "model": comparison["model"],
        "weights": comparison["weights"],
        "version": comparison["benchmark"].get("version", 1),
        "questions": len(comparison["rows"]),
        "requests": REQUESTS,
        "repeats": REPEATS,
        "stock": stock["accuracy"][AVERAGE],
        "profiles": profiles,
        "speed": [],
    }


def measure(result: dict[str, Any], model: Path, keep: Any) -> None:
    """Adds the speeds that are missing; ``keep`` is called behind each.

    Raises:
        SettingError: another model than the one that was compared, or a profile that does not do what it did there.
    """
    if weights_digest(model) != result["weights"]:
        raise SettingError(
            "model", str(model), f"it is not {result['model']}, which was compared", "name its directory"
        )
    does = {entry["profile"]: entry["does"] for entry in result["profiles"]}
    have = {does[entry["profile"]] for entry in result["speed"]}
    wanted = []
    # A profile of every method comes before the second seed of any.
    for entry in sorted(result["profiles"], key=lambda entry: int(entry["seed"])):
        profile = parse_profile(entry["theta"])
        if digest(profile) != entry["does"]:
            raise SettingError("comparison", entry["profile"], "it is read otherwise today", "compare again")
        if entry["does"] not in have:  # two searches may find one profile
            have.add(entry["does"])
            wanted.append((entry["profile"], profile, [int(cost) for cost in entry["accuracy"]]))
    with tempfile.TemporaryDirectory(prefix="eos-served-") as folder:
        rows = read_rows(export(Path(folder) / "rows", "test", _IMAGES, version=result["version"]))
        for found in speeds(model, rows, wanted):
            print(f"{found['profile']}: stock {found['stock']}, ours {found['requests_per_second']}", flush=True)
            result["speed"].append(found)
            keep()


def points(result: Mapping[str, Any]) -> dict[str, list[tuple[int, dict[str, float], Share]]]:
    """By profile: cost, requests per second over stock's with the range of its rounds, which are too few for an
    interval, and accuracy, of those that were served; profiles that do the same were served once."""
    does = {entry["profile"]: entry["does"] for entry in result["profiles"]}
    speed = {does[entry["profile"]]: pairs(entry) for entry in result["speed"]}
    return {
        entry["profile"]: [
            (int(cost), _ratio(*speed[entry["does"]][int(cost)]), Share(**share))
            for cost, share in entry["accuracy"].items()
        ]
        for entry in result["profiles"]
        if entry["does"] in speed
    }


def _ratio(ours: Sequence[float], stock: Sequence[float]) -> dict[str, float]:
    rounds = [own / theirs for own, theirs in zip(ours, stock, strict=True)]
    return {"ratio": statistics.geometric_mean(rounds), "low": min(rounds), "high": max(rounds)}


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a row for each profile; accuracy with its 95 % interval, and behind the semicolon requests per second
    over stock's with the range of the rounds."""
    every = points(result)
    costs = sorted({cost for each in every.values() for cost, _, _ in each}, reverse=True)
    lines = [
        f"All tokens: {Share(**result['stock'])}",
        "",
        "| profile | " + " | ".join(map(str, costs)) + " |",
        "| --- |" + " --- |" * len(costs),
    ]
    for name, each in every.items():
        cells = {
            cost: f"{share}; {ratio['ratio']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
            for cost, ratio, share in each
        }
        lines.append(f"| {name} | " + " | ".join(cells.get(cost, "-") for cost in costs) + " |")
    return "\n".join(lines)


def figure(result: Mapping[str, Any]) -> tuple[Figure, dict[str, Any]]:
    """A line for each profile, a colour for each method; the dot is the unreduced model.

    Returns:
        The figure, and its data.
    """
    drawn, (axis,) = panels(1, 1, 6.0, 4.0)
    methods = list(dict.fromkeys(entry["method"] for entry in result["profiles"]))
    method_of = {entry["profile"]: entry["method"] for entry in result["profiles"]}
    data: dict[str, Any] = {"figure": "served comparison", "profiles": {}}
    named = set()
    for name, each in points(result).items():
        number = methods.index(method_of[name])
        label = None if method_of[name] in named else method_of[name]
        named.add(method_of[name])
        x, y = [ratio["ratio"] for _, ratio, _ in each], [100 * share.value for _, _, share in each]
        axis.plot(x, y, marker=MARKS[number], markersize=4, linewidth=1, color=f"C{number}", label=label)
        data["profiles"][name] = [
            {
                "cost": cost,
                "over_stock": ratio["ratio"],
                "over_stock_low": ratio["low"],
                "over_stock_high": ratio["high"],
                "value": 100 * share.value,
                "low": 100 * share.low,
                "high": 100 * share.high,
            }
            for cost, ratio, share in each
        ]
    axis.plot([1], [100 * result["stock"]["value"]], "ko", markersize=6, label="stock, all tokens")
    axis.set(xlabel="requests per second over stock's", ylabel="right answers, %")
    axis.legend(fontsize=8)
    return drawn, data


def main() -> int:
    """Measures what is missing, or draws what was measured; returns 0."""
    parser = common.parser_of(__doc__)
    parser.add_argument(
        "--comparison", type=Path, default=Path("results/comparison.json"), help="of eos-search compare"
    )
    parser.add_argument("--model", type=Path, default=None, help="directory of the model (default: embedded)")
    parser.add_argument("--figure", type=Path, default=None, help="draw it to this PNG")
    args = common.parse(parser, out=Path("results/comparison-served.json"))
    if args.table:
        result = common.read(args.table)
    else:
        common.quiet_engines()
        result = begin(common.read(args.comparison))
        if args.out.exists():
            earlier = common.read(args.out)
            if earlier["profiles"] != result["profiles"]:
                raise SettingError("out", str(args.out), "it is of another comparison", "name another file")
            result = earlier
        measure(result, args.model or embedded.path(), lambda: common.write(args.out, result))
    print(table(result))
    if args.figure:
        from matplotlib import rc_context

        with rc_context(STYLE):
            drawn, data = figure(result)
            save(drawn, args.figure, data)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
