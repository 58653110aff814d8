"""``eos-search evaluate``: accuracy of profiles at budgets, by the reference or through a running server."""

import argparse
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eos_search.accuracy import chance, difference
from eos_search.accuracy_page import accuracy_page
from eos_search.answerers import ReferenceAnswerer, ServerAnswerer
from eos_search.evaluation import cases, evaluate, read_result, table
from eos_vllm.cluttervqa import SPLITS, Row, export, read_rows
from eos_vllm.core.budget import parse_budget
from eos_vllm.core.errors import EosError

BUDGETS = "192,128,96,64,32,16"


def add_parser(subparsers: Any) -> None:
    """Registers ``evaluate``."""
    parser = subparsers.add_parser("evaluate", help="accuracy of profiles at budgets, with intervals")
    parser.add_argument(
        "--profiles", default="none", help="comma-separated names or paths; none, blind, random, oracle"
    )
    parser.add_argument("--budgets", default=BUDGETS, help="comma-separated, or 'own' (default: %(default)s)")
    parser.add_argument("--model", default=None, help="model directory (default: the embedded model)")
    parser.add_argument("--rows", type=Path, default=None, help="JSONL of questions instead of ClutterVQA")
    parser.add_argument("--split", choices=SPLITS, default="test", help="split of ClutterVQA (default: %(default)s)")
    parser.add_argument("--images", type=int, default=200, help="images of it (default: %(default)s)")
    parser.add_argument("--per-kind", type=int, default=None, help="at most so many questions of each kind")
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--processes", type=int, default=None, help="default: one for each core")
    parser.add_argument("--base-url", default=None, help="ask this server, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--served-model", default="embedded", help="its model name (default: %(default)s)")
    parser.add_argument("--against", default=None, help="profile whose paired difference to the others is printed")
    parser.add_argument("--out", type=Path, default=None, help="raw result; a stopped evaluation goes on from it")
    parser.add_argument("--table", type=Path, default=None, help="print the tables of this result, and ask nothing")
    parser.add_argument("--figure", type=Path, default=None, help="draw accuracy against budget to this PNG")
    parser.add_argument("--page", type=Path, default=None, help="write tables and text to this Markdown file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluates, or draws what was evaluated."""
    if args.page and not (args.figure and (args.table or args.out)):
        raise EosError(
            "--page", str(args.page), "lacks its figure or its raw result", "give --figure, and --out or --table"
        )
    result = read_result(args.table) if args.table else measure(args)
    kinds = list(result["cases"][0]["accuracy"])
    print("\n\n".join(table(result, kind) for kind in [kinds[-1], *kinds[:-1]]))
    if args.against:
        print("\n" + differences(result, args.against))
    if args.figure:
        from eos_search.figures import accuracy_figure

        accuracy_figure(result, args.figure)
    if args.page:
        source, figure = args.table or args.out, args.figure.name if args.figure else ""
        args.page.write_text(accuracy_page(result, str(source), figure), encoding="utf-8")
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the evaluation that the arguments describe."""
    from eos_vllm.provenance import provenance

    budgets = [None] if args.budgets == "own" else [parse_budget(b, "--budgets") for b in args.budgets.split(",")]
    wanted = cases([name.strip() for name in args.profiles.split(",")], budgets)
    with tempfile.TemporaryDirectory(prefix="eos-rows-") as folder:
        file = args.rows or export(folder, args.split, args.images)
        rows = limit(read_rows(file), args.per_kind)
        if not rows:
            raise EosError("rows", str(file), "holds no question", "name a JSONL with at least one")
        result: dict[str, Any] = {
            "provenance": provenance(seed=0),
            "through": "server" if args.base_url else "reference",
            "model": Path(args.model).name if args.model else "embedded",
            "benchmark": {"source": args.rows.name if args.rows else f"ClutterVQA {args.split}", "images": args.images},
            "fingerprint": fingerprint(rows),
            "chance": chance(rows),
            "rows": [plain(row) for row in rows],
            "cases": [],
        }
        done = earlier(args.out, result)

        def keep(records: list[dict[str, Any]]) -> None:
            # What an earlier run has measured stays in the file until this one has come to it.
            reached = {(r["profile"], r["budget"]) for r in records}
            later = [r for r in done if (r["profile"], r["budget"]) not in reached]
            result["cases"] = records + later
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(result, separators=(",", ":")) + "\n")

        answerer = answerer_for(args)
        try:
            with tqdm(total=len(rows) * len(wanted), unit="question") as bar:
                result["cases"] = evaluate(answerer, rows, wanted, lambda name: _told(bar, name), done, keep)
        finally:
            answerer.close()
    return result


def answerer_for(args: argparse.Namespace) -> ReferenceAnswerer | ServerAnswerer:
    """The server where an address is given, else the reference."""
    if args.base_url:
        return ServerAnswerer(args.base_url, args.served_model, args.max_tokens)
    from eos_vllm.models import embedded

    return ReferenceAnswerer(args.model or embedded.path(), args.max_tokens, args.processes)


def limit(rows: Sequence[Row], per_kind: int | None) -> list[Row]:
    """The first ``per_kind`` rows of each kind, in their order."""
    if per_kind is None:
        return list(rows)
    seen: dict[str, int] = {}
    kept = []
    for row in rows:
        seen[row.kind] = seen.get(row.kind, 0) + 1
        if seen[row.kind] <= per_kind:
            kept.append(row)
    return kept


def plain(row: Row) -> dict[str, Any]:
    """What of a row is kept beside the replies."""
    image = row.image_files[0].name if row.image_files else ""
    return {"id": row.id, "kind": row.kind, "form": row.form, "answer": row.answer, "image": image}


def fingerprint(rows: Sequence[Row]) -> str:
    """Digest of questions, answers and image names."""
    lines = [f"{r.id}\t{r.prompt}\t{r.answer}\t{[f.name for f in r.image_files]}" for r in rows]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def earlier(out: Path | None, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of an earlier run with the same rows and the same model.

    Raises:
        EosError: the file holds another evaluation.
    """
    if out is None or not out.exists():
        return []
    before = read_result(out)
    for field in ("fingerprint", "model", "through"):
        if before[field] != result[field]:
            raise EosError("--out", str(out), f"holds an evaluation of another {field}", "name another file")
    return before["cases"]


def differences(result: dict[str, Any], against: str) -> str:
    """Paired differences in accuracy of one profile to each other one at the same budget, in points."""
    rows = [Row(r["id"], r["kind"], "", r["answer"], (Path(r["image"]),), ()) for r in result["rows"]]
    lines = [f"| {against} minus | budget | points |", "| --- | --- | --- |"]
    ours = {c["budget"]: c["replies"] for c in result["cases"] if c["profile"] == against}
    for case in result["cases"]:
        if case["profile"] != against and case["budget"] in ours:
            share = difference(rows, ours[case["budget"]], case["replies"])["average"]
            lines.append(f"| {case['profile']} | {case['budget']} | {share} |")
    return "\n".join(lines)


def _told(bar: Any, name: str) -> Any:
    bar.set_description(name)
    return bar.update
