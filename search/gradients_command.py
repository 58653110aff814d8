"""``eos-search ablate gradients``: estimators of "how much" against differences of the hard loss."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eos_vllm.cluttervqa import SPLITS
from eos_vllm.core.budget import parse_tokens
from eos_vllm.core.errors import EosError, SettingError

_LINE = "estimators of the gradient of counts against differences of the hard loss"


def add_study(studies: Any) -> None:
    """Registers ``gradients`` among the studies of ``eos-search ablate``."""
    study = studies.add_parser("gradients", help=_LINE, description=_LINE[0].upper() + _LINE[1:] + ".")
    study.add_argument("--config", required=True, help="settings of a search: embedded, ... or a JSON file")
    study.add_argument("--run", dest="folder", type=Path, help="folder of a search: its last Theta is a point, too")
    study.add_argument("--budgets", default="own", help="comma-separated, 'own' for Eq. 11 (default: %(default)s)")
    study.add_argument("--model", default=None, help="model directory (default: the config's)")
    study.add_argument("--split", choices=SPLITS, default="validation", help="of ClutterVQA (default: %(default)s)")
    study.add_argument("--questions", type=int, default=64, help="how many (default: %(default)s)")
    study.add_argument("--width", type=float, default=0.15, help="step of the reference in the logarithm of a share")
    study.add_argument("--out", type=Path, default=None, help="raw result; what it holds is not measured again")
    study.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures, and prints the table."""
    from eos_search.ablations.verdicts import gradients_table

    if args.questions < 2:
        raise SettingError("questions", args.questions, "gives no standard error", "give 2 or more")
    if not 0 < args.width <= 1:
        raise SettingError("width", args.width, "this is no step of a logarithm", "give a number in (0, 1]")
    print(gradients_table(measure(args)))
    if args.out:
        print(f"wrote {args.out}", file=sys.stderr)
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the study that the arguments describe, and returns its raw result.

    Raises:
        EosError: settings, a model, data, a run or an earlier result that cannot be.
    """
    import torch
    from tqdm import tqdm

    from eos_search.ablations.gradients import Bench, Question, run_gradients
    from eos_search.data import load_data
    from eos_search.examples import Broken, Encoder, prepare
    from eos_search.export import portable
    from eos_search.frozen import load_frozen, model_path
    from eos_search.process import deterministic
    from eos_search.raw import weights_digest
    from eos_search.settings import read_config, read_settings
    from eos_search.space import search_space
    from eos_vllm.provenance import provenance

    budgets = [None if b == "own" else parse_tokens(b, "--budgets") for b in args.budgets.split(",")]
    # Questions about one image go together: drawn among more, nearly every one is about its own.
    flags = {"samples": 8 * args.questions, "split": args.split, "output": "unused", "model": args.model}
    given = {name: value for name, value in flags.items() if value is not None}
    settings = read_settings(read_config(args.config), given)
    with deterministic():
        frozen = load_frozen(settings, torch.device("cpu"))
        objective, rules, theta = search_space(settings, frozen.spec)
        points = _points(args.folder, theta)
        encoder = Encoder(
            frozen.processor, settings.prompt, settings.answer, objective.visual_tokens, settings.max_tokens
        )
        data = load_data(settings, encoder)
        bench = Bench(frozen.model, rules, objective, settings.boundary_sharpness, settings.keep_width, args.width)

        def maker(index: int) -> Callable[[], Question]:
            def make() -> Question:
                row = data.rows[index]
                encoded = encoder.encode(index, row)
                if isinstance(encoded, Broken):
                    raise EosError("data", row.id, f"it cannot be decoded ({encoded.problem})", "leave out this row")
                rule, total = rules.importance.queries, bench.visual_tokens
                example = prepare(frozen.model, encoded, rule, total, rules.select)
                return bench.question(row.id, row.category, example)

            return make

        header = {
            "provenance": provenance(seed=settings.seed),
            "model": Path(settings.model).name,
            "weights": weights_digest(model_path(settings.model)),
            "data": {"split": settings.split, **data.to_dict()},
            "settings": portable(settings),
        }
        makers = [maker(index) for index in range(min(args.questions, len(data.rows)))]
        with tqdm(total=len(makers), unit="question") as bar:
            earlier = _earlier(args.out)
            bar.update(len(earlier["rows"]) if earlier else 0)
            return run_gradients(bench, points, budgets, makers, header, args.out, earlier, bar.update)


def _points(folder: Path | None, theta: Any) -> list[Any]:
    """The start of the config, and the last recorded Theta of a run."""
    import torch

    from eos_search.ablations.gradients import Point
    from eos_search.run_folder import read_records
    from eos_search.theta import KINDS

    table = theta().table.detach()
    points = [Point("start", table)]
    if folder is None:
        return points
    told = [record["values"] for record in read_records(folder) if "values" in record]
    if not told:
        raise EosError("--run", folder.name, "no record there holds Theta", "give the folder of a search that ran")
    searched = torch.tensor([told[-1][kind] for kind in KINDS], dtype=torch.float64).T.contiguous()
    if searched.shape != table.shape:
        problem = f"its Theta is of {len(searched)} layers, the model has {len(table)}"
        raise EosError("--run", folder.name, problem, "give a run of the same model")
    return [*points, Point("searched", searched)]


def _earlier(out: Path | None) -> Mapping[str, Any] | None:
    if out is None or not out.exists():
        return None
    try:
        document = json.loads(out.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EosError("--out", str(out), f"it cannot be read ({error})", "name another file") from None
    if not isinstance(document, dict) or not isinstance(document.get("rows"), list):
        raise EosError("--out", str(out), "holds another kind of result", "name another file")
    return document
