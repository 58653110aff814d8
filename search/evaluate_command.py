"""``eos-search evaluate``: accuracy of profiles at budgets, by the reference or through a running server."""

import argparse
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eos_search.accuracy import chance
from eos_search.accuracy_page import accuracy_page, margins_table
from eos_search.answerers import STOCK, Case, ReferenceAnswerer
from eos_search.discrimination import with_both_means
from eos_search.evaluation import cases, evaluate, key, table
from eos_search.raw import fingerprint, plain, read_earlier, read_result, weights_digest, write_raw
from eos_search.scorers import EXACT, SCORERS, check_fields, scorer_of
from eos_search.selection import EARLIER, WINDOWS, rows_before
from eos_search.server_answerer import ServerAnswerer
from eos_vllm.cluttervqa import SPLITS, VERSIONS, Row, export, read_rows, version_of
from eos_vllm.core.budget import Share, parse_budget
from eos_vllm.core.errors import EosError

BUDGETS = "192,128,96,64,32,16"


def add_parser(subparsers: Any) -> None:
    """Registers ``evaluate``."""
    parser = subparsers.add_parser("evaluate", help="accuracy of profiles at budgets, with intervals")
    parser.add_argument(
        "--profiles", default="none", help="comma-separated names or paths; none, blind, random@P, prune@P, ..."
    )
    parser.add_argument("--budgets", default=BUDGETS, help="comma-separated, or 'own' (default: %(default)s)")
    parser.add_argument("--model", default=None, help="model directory (default: the embedded model)")
    parser.add_argument("--rows", type=Path, default=None, help="JSONL of questions instead of ClutterVQA")
    parser.add_argument(
        "--scorer", choices=tuple(SCORERS), default=None, help=f"marks the replies (default: {EXACT.name})"
    )
    parser.add_argument(
        "--benchmark-version", type=int, choices=tuple(VERSIONS), default=1, help="of ClutterVQA (default: %(default)s)"
    )
    parser.add_argument("--split", choices=SPLITS, default="test", help="split of ClutterVQA (default: %(default)s)")
    parser.add_argument("--images", type=int, default=200, help="images of it (default: %(default)s)")
    parser.add_argument("--first-image", type=int, default=0, help="number of the first one (default: %(default)s)")
    parser.add_argument("--per-kind", type=int, default=None, help="at most so many questions of each kind")
    parser.add_argument("--max-tokens", type=int, default=8)
    parser.add_argument("--processes", type=int, default=None, help="default: one for each core")
    parser.add_argument(
        "--base-url",
        default=None,
        help="ask this server (http://127.0.0.1:8000/v1); a lone none means one without a profile",
    )
    parser.add_argument("--served-model", default="embedded", help="its model name (default: %(default)s)")
    parser.add_argument("--against", default=None, help="profile whose paired difference to the others is printed")
    parser.add_argument("--out", type=Path, default=None, help="raw result; a stopped evaluation goes on from it")
    parser.add_argument("--table", type=Path, default=None, help="print the tables of this result, and ask nothing")
    parser.add_argument("--figure", type=Path, default=None, help="draw accuracy against budget to this PNG")
    parser.add_argument("--page", type=Path, default=None, help="write tables and text to this Markdown file")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluates, or draws what was evaluated."""
    check(args)
    wanted = [] if args.table else named_cases(args)
    if wanted and not (args.out and args.out.is_file()):  # a file may hold what is not asked for now
        _check_against(args.against, {case.name for case in wanted if case.profile is not None})
    result = measure(args, wanted) if wanted else read_result(args.table)
    if result.get("benchmark", {}).get("version", 1) > 1:
        result = with_both_means(result)
    _check_against(args.against, {case["profile"] for case in result["cases"] if case["budget"]})
    kinds = list(result["cases"][0]["accuracy"])
    print("\n\n".join(table(result, kind) for kind in [kinds[-1], *kinds[:-1]]))
    if args.against:
        print(f"\n{args.against} minus the others, points\n{margins_table(result, args.against)}")
    if args.figure:
        from eos_search.figures import accuracy_figure

        accuracy_figure(result, args.figure)
    if args.page:
        page = accuracy_page(result, str(args.table or args.out), args.page, args.figure.name, args.against)
        args.page.parent.mkdir(parents=True, exist_ok=True)
        args.page.write_text(page, encoding="utf-8")
    return 0


def _check_against(name: str | None, names: Collection[str]) -> None:
    if name and name not in names:
        remedy = f"give one of {', '.join(sorted(names)) or 'those'}"
        raise EosError("--against", name, "is not among the cases with a budget", remedy)


def check(args: argparse.Namespace) -> None:
    """Refuses what would only fail after the work.

    Raises:
        EosError: an option out of range, or without another one that it needs.
    """
    for name in ("images", "max_tokens", "per_kind", "processes"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise EosError(f"--{name.replace('_', '-')}", value, "is below 1", "give 1 or more")
    if args.first_image < 0 or (args.first_image and args.rows):
        problem = "is below 0" if args.first_image < 0 else "counts ClutterVQA's images, and rows are given"
        raise EosError("--first-image", args.first_image, problem, "leave it out")
    if args.page and not (args.figure and (args.table or args.out)):
        problem = "lacks its figure or its raw result"
        raise EosError("--page", str(args.page), problem, "give --figure, and --out or --table")
    if args.table and args.scorer and args.scorer != (name := scorer_of(read_result(args.table)).name):
        raise EosError("--scorer", args.scorer, f"is not that of the result, {name}", "leave it out, or evaluate anew")
    if args.model and not Path(args.model).is_dir():
        raise EosError("--model", args.model, "is no directory", "name a model's directory")


def named_cases(args: argparse.Namespace) -> list[Case]:
    """Every profile at every budget that the arguments name.

    Raises:
        EosError: as :func:`eos_search.evaluation.cases`, or a budget of all tokens.
    """
    budgets = [None] if args.budgets == "own" else [parse_budget(b, "--budgets") for b in args.budgets.split(",")]
    if Share(1.0) in budgets:
        raise EosError("--budgets", args.budgets, "100% reduces nothing", f"leave it out: profile {STOCK} answers that")
    return cases([name.strip() for name in args.profiles.split(",")], budgets)


def measure(args: argparse.Namespace, wanted: Sequence[Case]) -> dict[str, Any]:
    """Runs the evaluation that the arguments describe; what its file held of other cases stays in it."""
    from eos_vllm.models import embedded
    from eos_vllm.provenance import provenance

    with tempfile.TemporaryDirectory(prefix="eos-rows-") as folder:
        version = version_of(args.benchmark_version)
        drawn = {"version": version.number, "start": args.first_image}
        file = args.rows or export(Path(folder) / "rows", args.split, args.images, **drawn)
        rows, scorer = read_rows(file), SCORERS[args.scorer or EXACT.name]
        check_fields(scorer, rows, file.name)
        rows = limit(rows, args.per_kind)
        check_rows(rows, wanted, str(file))
        source: dict[str, Any] = {"source": args.rows.name if args.rows else f"{version.title} {args.split}"}
        if not args.rows and version.number > 1:
            source["version"] = version.number
        if not args.rows and args.first_image:
            source["first_image"] = args.first_image
        result: dict[str, Any] = {
            "provenance": provenance(seed=0),
            "through": "server" if args.base_url else "reference",
            "model": args.served_model if args.base_url else Path(args.model or "embedded").name,
            "weights": None if args.base_url else weights_digest(args.model or embedded.path()),
            "max_tokens": args.max_tokens,
            "scorer": scorer.name,
            "benchmark": source | {"images": len({row.image_files for row in rows})},
            "fingerprint": fingerprint(rows),
            "chance": {} if scorer.graded else chance(rows),
            "rows": [plain(row) for row in rows],
            "cases": [],
        }
        done = read_earlier(args.out, result, ("fingerprint", "model", "weights", "max_tokens", "through", "scorer"))

        def keep(records: list[dict[str, Any]]) -> None:
            # What an earlier run has measured stays in the file until this one has come to it.
            reached = {key(record) for record in records}
            result["cases"] = records + [record for record in done if key(record) not in reached]
            if args.out:
                write_raw(args.out, result)

        answerer = answerer_for(args, wanted)
        try:
            with tqdm(total=len(rows) * len(wanted), unit="question") as bar:
                evaluate(answerer, rows, wanted, lambda name: _told(bar, name), done, keep, scorer)
        finally:
            answerer.close()
    return result


def check_rows(rows: Sequence[Row], wanted: Sequence[Case], file: str) -> None:
    """Refuses rows that cannot be asked, before any is.

    Raises:
        EosError: there are none, an image is missing, or a selection lacks its one image, its boxes, another
            question or a chat.
    """
    if not rows:
        raise EosError("rows", file, "holds no question", "name a JSONL with at least one")
    selections = {case.selection for case in wanted}
    chats = [row for row in rows if row.history]
    for row in rows:
        for image in row.image_files:
            if not image.is_file():
                raise EosError("image_files", str(image), f"is missing (row {row.id})", "put it there, or drop the row")
        if selections - {None} and len(row.image_files) != 1:
            problem = f"has {len(row.image_files)} images"
            raise EosError("rows", row.id, problem, "evaluate random@, oracle@ and earlier@ on rows of one image")
        if "oracle" in selections and not row.boxes:
            raise EosError("boxes", row.id, "are missing", "evaluate oracle@ on rows that have them")
    for case in wanted:
        if case.changed in WINDOWS and not chats:
            problem = f"hold no chat, and {case.name} is about later turns"
            raise EosError("rows", file, problem, "give the turns of a chat the same chat")
    if EARLIER in selections:
        if chats:
            problem = "is a later turn of a chat"
            raise EosError("rows", chats[0].id, problem, "evaluate turn@: there the first question chooses")
        lone = [rows[i].id for i, before in enumerate(rows_before(rows)) if i == before]
        if lone:
            raise EosError("rows", lone[0], "is the only one about its image", "evaluate earlier@ on two or more")


def answerer_for(args: argparse.Namespace, wanted: Sequence[Case]) -> ReferenceAnswerer | ServerAnswerer:
    """The server where an address is given, else the reference.

    Raises:
        EosError: more than one profile for one server, or a server that doesn't serve the model.
    """
    if args.base_url:
        found = {case.name: case.profile for case in wanted if case.profile is not None}
        if len(found) > 1:
            problem = "a server has one profile"
            raise EosError("--profiles", ",".join(found), problem, "name that, and none for the unreduced answers")
        unreduced = next((profile.model.visual_tokens or "100%" for profile in found.values()), None)
        return ServerAnswerer(args.base_url, args.served_model, args.max_tokens, unreduced)
    for case in wanted:
        if case.profile is not None and case.profile.model.visual_tokens is None:
            problem = "it takes images of any size, which the reference does not"
            raise EosError("--profiles", case.name, problem, "evaluate a server that has it: --base-url")
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


def _told(bar: Any, name: str) -> Any:
    bar.set_description(name)
    return bar.update
