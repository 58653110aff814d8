"""``eos-search ablate``: the paper's studies over the accuracy of the reference, as raw results that plots draw."""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eos_vllm.cluttervqa import SPLITS, VERSIONS, version_of
from eos_vllm.core.budget import parse_tokens
from eos_vllm.core.errors import EosError, SettingError

# Study: its line of help, and the budgets of the paper's figure or table.
STUDIES = {
    "alignment": ("weight of the alignment, with CE-off: a search for each (Fig. 4)", "64,16"),
    "placement": ("each reducer moved alone, and the first and the last together (Fig. 5)", "64,16"),
    "operator": ("each operator parameter of each reducer (Fig. 6)", "192,64,16"),
    "budgets": ("several profiles at several budgets (Fig. 7, Table 8)", "192,128,96,64,32,16"),
    "robustness": ("reducers moved and removed (Table 9)", "16"),
    "reading": ("images withdrawn behind each layer: where a model reads them", "1"),
}


def add_parser(subparsers: Any) -> None:
    """Registers ``ablate`` with a subcommand for each study."""
    from eos_search import gradients_command, planted_command

    parser = subparsers.add_parser("ablate", help="the paper's studies: alignment, placement, operator, budgets, ...")
    studies = parser.add_subparsers(dest="study", metavar="STUDY", required=True)
    for name, (line, budgets) in STUDIES.items():
        study = studies.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".")
        if name == "alignment":
            _add_alignment(study)
        elif name == "budgets":
            study.add_argument("--profiles", required=True, help="comma-separated names or paths")
        elif name != "reading":
            study.add_argument("--profile", required=True, help="the profile that is varied: a path or a shipped name")
        if name == "placement":
            study.add_argument("--stride", type=int, default=1, metavar="N", help="take every N-th layer")
        if name == "operator":
            study.add_argument(
                "--grid",
                action="append",
                default=[],
                metavar="PARAMETER=A,B,...",
                help="values of one parameter; once given, parameters that are not named are left out",
            )
        _add_evaluation(study, budgets)
        study.set_defaults(run=run)
    gradients_command.add_study(studies)
    planted_command.add_study(studies)


def _add_alignment(study: argparse.ArgumentParser) -> None:
    study.add_argument("--config", required=True, help="settings of the search: embedded, ... or a JSON file")
    study.add_argument("--runs", type=Path, default=Path("runs/alignment"), help="folders of the searches go here")
    study.add_argument("--lambdas", default=None, metavar="A,B,...", help="weights (default: the paper's, 0 to 0.5)")
    study.add_argument("--steps", type=int, default=None, help="steps of each search (default: the config's)")
    study.add_argument("--seed", type=int, default=None, help="seed of each search (default: the config's)")
    study.add_argument("--quiet", action="store_true", help="no progress of the searches")


def _add_evaluation(study: argparse.ArgumentParser, budgets: str) -> None:
    study.add_argument("--budgets", default=budgets, help="comma-separated, or 'own' (default: %(default)s)")
    study.add_argument("--model", default=None, help="model directory (default: the embedded model)")
    study.add_argument("--rows", type=Path, default=None, help="JSONL of questions instead of ClutterVQA")
    study.add_argument("--split", choices=SPLITS, default="test", help="split of ClutterVQA (default: %(default)s)")
    study.add_argument(
        "--benchmark-version", type=int, choices=tuple(VERSIONS), default=1, help="of ClutterVQA (default: %(default)s)"
    )
    study.add_argument("--images", type=int, default=100, help="images of it (default: %(default)s)")
    study.add_argument("--per-kind", type=int, default=None, help="at most so many questions of each kind")
    study.add_argument("--max-tokens", type=int, default=8, help="longest answer (default: %(default)s)")
    study.add_argument("--processes", type=int, default=None, help="default: one for each core")
    study.add_argument("--out", type=Path, default=None, help="raw result; what it holds is not asked again")


def run(args: argparse.Namespace) -> int:
    """Runs the study that was asked for, and prints its table."""
    from eos_search.ablations.tables import reading_depth, study_table
    from eos_search.ablations.variants import BASE

    result = measure(args)
    names = {case["profile"] for case in result["cases"]}
    print(study_table(result, against=BASE if BASE in names else ""))
    if args.out:
        print(f"wrote {args.out}", file=sys.stderr)
    if args.study == "reading":
        print(f"\nhalf of what an image is worth is read by layer {reading_depth(result)}")
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the study that the arguments describe, and returns its raw result."""
    from tqdm import tqdm

    from eos_search.ablations.study import run_study
    from eos_search.accuracy import chance
    from eos_search.answerers import ReferenceAnswerer
    from eos_search.evaluate_command import limit
    from eos_search.frozen import EMBEDDED, model_path
    from eos_search.raw import weights_digest
    from eos_search.scorers import EXACT, check_fields
    from eos_vllm.cluttervqa import export, read_rows
    from eos_vllm.provenance import provenance

    budgets = [None] if args.budgets == "own" else [parse_tokens(b, "--budgets") for b in args.budgets.split(",")]
    study = make_study(args)
    with tempfile.TemporaryDirectory(prefix="eos-rows-") as folder:
        version = version_of(args.benchmark_version)
        file = args.rows or export(folder, args.split, args.images, version=version.number)
        rows = read_rows(file)
        check_fields(EXACT, rows, Path(file).name)
        rows = limit(rows, args.per_kind)
        if not rows:
            raise EosError("rows", str(file), "holds no question", "name a JSONL with at least one")
        header = {
            "provenance": provenance(seed=0),
            "model": Path(args.model).name if args.model else EMBEDDED,
            "weights": weights_digest(args.model or model_path(EMBEDDED)),
            "max_tokens": args.max_tokens,
            "benchmark": {
                "source": args.rows.name if args.rows else f"{version.title} {args.split}",
                "images": args.images,
            },
            "chance": chance(rows),
        }
        answerer = ReferenceAnswerer(args.model or model_path(EMBEDDED), args.max_tokens, args.processes)
        total = len(rows) * (1 + len(study.variants) * len(budgets))
        try:
            with tqdm(total=total, unit="question") as bar:
                return run_study(study, budgets, rows, answerer, header, args.out, lambda label: _told(bar, label))
        finally:
            answerer.close()


def make_study(args: argparse.Namespace) -> Any:
    """The study that the arguments describe; ``alignment`` runs its searches here.

    Raises:
        EosError: a profile, a grid or settings that cannot be.
    """
    from eos_search.ablations import variants
    from eos_search.ablations.study import Study
    from eos_search.frozen import EMBEDDED, model_sizes
    from eos_vllm import profiles
    from eos_vllm.core.profile import ModelSpec

    if args.study == "alignment":
        return _alignment(args)
    if args.study == "budgets":
        named = [profiles.resolve(name.strip()) for name in args.profiles.split(",")]
        return Study("budgets", tuple(variants.Variant(p.name, p, {"layers": list(p.layers)}) for p in named))
    if args.study == "reading":
        sizes = model_sizes(args.model or EMBEDDED)
        fields = {name: getattr(sizes, name) for name in ("architecture", "num_decoder_layers", "visual_tokens")}
        return Study("reading", tuple(variants.reading_variants(ModelSpec(**fields))))
    base = profiles.resolve(args.profile)
    if args.study == "placement":
        if args.stride < 1:
            raise SettingError("stride", args.stride, "this is no stride", "give 1 or more")
        made = variants.placement_variants(base, args.stride)
    elif args.study == "operator":
        made = variants.operator_variants(base, parse_grid(args.grid) or variants.GRID)
    else:
        made = variants.robustness_variants(base)
    return Study(args.study, (variants.base_variant(base), *made), base)


def parse_grid(given: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Grids of ``--grid``, each ``parameter=a,b,...``.

    Raises:
        SettingError: an unknown parameter, or values that are no numbers.
    """
    from eos_search.ablations.variants import GRID

    found = {}
    for text in given:
        name, _, values = text.partition("=")
        try:
            numbers = tuple(dict.fromkeys(float(value) for value in values.split(",")))
        except ValueError:
            numbers = ()
        if name not in GRID or not numbers:
            remedy = f"give one of {', '.join(GRID)} and its values, such as gamma=0,0.1,1"
            raise SettingError("grid", text, "this is no grid of a parameter", remedy)
        found[name] = numbers
    return found


def _alignment(args: argparse.Namespace) -> Any:
    from eos_search.ablations.searches import LAMBDAS, alignment_searches, run_searches
    from eos_search.ablations.study import Study
    from eos_search.settings import read_config, read_settings

    try:
        lambdas = tuple(float(value) for value in args.lambdas.split(",")) if args.lambdas else LAMBDAS
    except ValueError:
        raise SettingError("lambdas", args.lambdas, "these are no numbers", "give them as 0,0.1,0.5") from None
    flags = {"output": str(args.runs), "steps": args.steps, "seed": args.seed, "model": args.model}
    given = {name: value for name, value in flags.items() if value is not None}
    settings = read_settings(read_config(args.config), given)
    if args.model is None and settings.model != "embedded":
        args.model = settings.model
    searches = alignment_searches(settings, args.runs, lambdas)
    found, failed = run_searches(searches, lambda line: print(line, file=sys.stderr), args.quiet)
    return Study("alignment", tuple(found), failed=failed)


def _told(bar: Any, label: str) -> Any:
    bar.set_description(label)
    return bar.update
