"""``eos-search ablate planted``: whether searches from one start find the layers where models were made to read."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eos_vllm.core.errors import EosError, SettingError

STUDY = "planted"
# As near as a search is to come: in layers.
NEAR = 1
_LINE = "where searches from one start first reduce in the decoder, against where models read"


def add_study(studies: Any) -> None:
    """Registers ``planted`` among the studies of ``eos-search ablate``."""
    study = studies.add_parser(STUDY, help=_LINE, description=_LINE[0].upper() + _LINE[1:] + ".")
    study.add_argument("--config", required=True, help="settings of the search, alike for all models")
    study.add_argument("--models", required=True, help="model directories, comma-separated")
    study.add_argument("--reading", required=True, help="results of `ablate reading` of these models, in their order")
    study.add_argument("--seeds", default="0,1,2", help="of the searches (default: %(default)s)")
    study.add_argument("--runs", type=Path, default=Path("runs/planted"), help="folders of the searches go here")
    study.add_argument("--out", type=Path, default=None, help="raw result")
    study.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Searches what has not been searched yet, and prints the table."""
    from eos_search.export import write_json

    result = measure(args)
    print(table(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.out, result)
        print(f"wrote {args.out}", file=sys.stderr)
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the searches, and returns the raw result.

    Raises:
        EosError: settings, models, seeds or results of other models.
    """
    from eos_search.ablations.places import loss_by_place
    from eos_search.export import portable
    from eos_search.settings import read_config, read_settings
    from eos_vllm.provenance import provenance

    models = [Path(part.strip()) for part in args.models.split(",")]
    readings = [Path(part.strip()) for part in args.reading.split(",")]
    if len(models) != len(readings):
        raise SettingError("reading", args.reading, f"there are {len(models)} models", "give one for each")
    if not all(part.strip().isdigit() for part in args.seeds.split(",")):
        raise SettingError("seeds", args.seeds, "these are no seeds", "give whole numbers, such as 0,1,2")
    seeds = [int(part) for part in args.seeds.split(",")]
    if len(set(seeds)) < len(seeds):
        raise SettingError("seeds", args.seeds, "one stands there twice", "give each once")
    config = read_config(args.config)
    told = [_reading(model, file) for model, file in zip(models, readings, strict=True)]
    found = []
    for model, about in zip(models, told, strict=True):
        searches = []
        for seed in seeds:
            name = f"{model.name}-s{seed}"
            own = {"model": str(model), "seed": seed, "name": name, "output": args.runs / name}
            settings = read_settings({**config, **own})
            searches.append(_search(settings, about["depth"]))
        found.append({**about, "settings": portable(settings), "searches": searches, "places": loss_by_place(settings)})
    return {"study": STUDY, "provenance": provenance(), "models": found}


def _reading(model: Path, file: Path) -> dict[str, Any]:
    from eos_search.ablations.tables import reading_depth
    from eos_search.accuracy import AVERAGE
    from eos_search.raw import read_result, weights_digest

    result = read_result(file)
    if result.get("study") != "reading" or result["weights"] != weights_digest(model):
        problem = f"is no study of where {model.name} reads"
        raise EosError("--reading", str(file), problem, "give what `eos-search ablate reading --out` made of it")
    behind = {case["layer"]: case["accuracy"][AVERAGE]["value"] for case in result["cases"] if "layer" in case}
    return {"model": model.name, "weights": result["weights"], "depth": reading_depth(result), "behind": behind}


def _search(settings: Any, depth: int) -> dict[str, Any]:
    from eos_search.ablations.searches import NO_REDUCER, profile_of
    from eos_search.run_folder import RUN, read_records

    try:
        profile = profile_of(settings, quiet=False)
    except EosError as error:
        if error.field != NO_REDUCER:
            raise
        return {"seed": settings.seed, "failed": str(error)}
    records = read_records(settings.output)
    first = min(reducer.layer for reducer in profile.inside)
    spent = json.loads((settings.output / RUN).read_text(encoding="utf-8"))
    return {
        "seed": settings.seed,
        "start": records[0]["acting"],
        "first": first,
        "apart": first - depth,
        "moves": moves(records),
        "cpu_seconds": spent.get("cpu_seconds"),
        "theta": profile.to_dict(),
    }


def moves(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Steps at which the acting layers changed, and what they then were; the first step is one."""
    found: list[dict[str, Any]] = []
    for record in records:
        if not found or found[-1]["acting"] != record["acting"]:
            found.append({"step": record["step"], "acting": record["acting"]})
    return found


def table(result: Mapping[str, Any]) -> str:
    """Markdown: a row for each search."""
    lines = ["| model | reads by layer | seed | start | first reducer | apart |", "| --- |" + " --- |" * 5]
    for about in result["models"]:
        for one in about["searches"]:
            where = ("", "none", "")
            if "first" in one:
                where = (", ".join(map(str, one["start"])), one["first"], f"{one['apart']:+d}")
            shown = (about["model"], about["depth"], one["seed"], *where)
            lines.append("| " + " | ".join(map(str, shown)) + " |")
    every = [one.get("apart") for about in result["models"] for one in about["searches"]]
    near = sum(apart is not None and abs(apart) <= NEAR for apart in every)
    return "\n".join([*lines, "", f"{near} of {len(every)} within {NEAR} layer", "", *_places(result)])


def _places(result: Mapping[str, Any]) -> list[str]:
    """What the start costs the task at every layer, a column for each model."""
    models = [about for about in result["models"] if "places" in about]
    if not models:
        return []
    lines = ["| layer | " + " | ".join(about["model"] for about in models) + " |", "| --- |" + " --- |" * len(models)]
    for layer in range(max(len(about["places"]) for about in models)):
        each = [about["places"][layer : layer + 1] for about in models]  # models may differ in depth
        cells = [f"{one[0]['task']:.3f} ± {one[0]['error']:.3f}" if one else "" for one in each]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return lines
