"""``eos-search plot``: figures from raw results, runs and profiles; nothing is measured here but kept patches."""

import argparse
import json
from pathlib import Path
from typing import Any

from eos_search.raw import read_result
from eos_vllm.core.budget import parse_tokens
from eos_vllm.core.errors import EosError

_FIGURES = {
    "equivalence": "the unified operator against canonical reductions (Fig. 3)",
    "alignment": "accuracy over the weight of the alignment (Fig. 4)",
    "placement": "accuracy over the places of the reducers, and their heat map (Fig. 5)",
    "operator": "accuracy over each operator parameter (Fig. 6)",
    "robustness": "points lost by reducers moved and removed (Table 9)",
    "reading": "accuracy over the layer behind which images are withdrawn",
    "budgets": "accuracy against the budget (Fig. 7)",
    "margin": "points of one profile over another at each budget (Fig. 7d)",
    "gradients": "estimators of the gradient of counts, and differences of the hard loss",
    "search": "gates, discards, gamma and tau by layer and during a search (Fig. 8)",
    "profile": "visual tokens by layer and operators of a profile",
    "patches": "patches that a profile keeps, drawn over an image",
}
_STUDIES = ("alignment", "placement", "operator", "robustness", "reading")


def add_parser(subparsers: Any) -> None:
    """Registers ``plot`` with a subcommand for each figure."""
    parser = subparsers.add_parser("plot", help="figures from raw results, runs and profiles, with their data as JSON")
    figures = parser.add_subparsers(dest="figure", metavar="FIGURE", required=True)
    made = {}
    for name, line in _FIGURES.items():
        figure = made[name] = figures.add_parser(name, help=line, description=line[0].upper() + line[1:] + ".")
        if name in (*_STUDIES, "budgets", "margin"):
            figure.add_argument("--raw", type=Path, required=True, help="raw result of eos-search ablate or evaluate")
        if name in ("placement", "operator", "robustness", "reading"):
            figure.add_argument("--kind", default="average", help="kind of question (default: %(default)s)")
        if name in ("margin", "profile", "patches"):
            figure.add_argument("--profile", required=True, help="name or path; in margin the name in the result")
        if name in ("profile", "patches"):
            figure.add_argument("--budgets", default="own", help="comma-separated (default: the profile's own)")
        figure.add_argument("--out", type=Path, required=True, help="PNG to write; its data go beside it as JSON")
        figure.set_defaults(run=run)
    made["equivalence"].add_argument("--raw", type=Path, default=None, help="also checks of `eos-vllm verify --json`")
    made["gradients"].add_argument("--raw", type=Path, required=True, help="of eos-search ablate gradients")
    made["margin"].add_argument("--against", required=True, help="profile in the result that is subtracted")
    made["search"].add_argument("--run", type=Path, required=True, dest="folder", help="folder of a search")
    patches = made["patches"]
    patches.add_argument("--model", default="embedded", help="model directory (default: the embedded model)")
    patches.add_argument("--image", type=Path, default=None, help="an image instead of one of ClutterVQA's test split")
    patches.add_argument("--question", default=None, help="what is asked about it")
    patches.add_argument("--index", type=int, default=0, help="number of ClutterVQA's image (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Draws one figure, and says where it and its data are."""
    from matplotlib import rc_context

    from eos_search.plots.canvas import STYLE, check_png, save, save_data

    check_png(args.out)
    with rc_context(STYLE):
        if args.figure == "budgets":
            from eos_search.plots.budgets import write_budgets_figure

            beside = save_data(args.out, _source(args) | write_budgets_figure(read_result(args.raw), args.out))
        else:
            figure, data = draw(args)
            beside = save(figure, args.out, _source(args) | data)
    print(f"wrote {args.out} and {beside}")
    return 0


def draw(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The figure that the arguments describe, and its data.

    Raises:
        EosError: a result, run, profile or image that is not there or is something else.
    """
    if args.figure in _STUDIES:
        from eos_search.plots import studies

        result = read_result(args.raw)
        if args.figure == "alignment":
            return studies.alignment_figure(result)
        return getattr(studies, f"{args.figure}_figure")(result, args.kind)
    if args.figure == "margin":
        from eos_search.plots.budgets import margin_figure

        return margin_figure(read_result(args.raw), args.profile, args.against)
    if args.figure == "equivalence":
        from eos_search.plots.equivalence import equivalence_figure, gaussian_checks, verified_checks

        return equivalence_figure(gaussian_checks() + (verified_checks(_json(args.raw)) if args.raw else []))
    if args.figure == "gradients":
        from eos_search.plots.gradients import gradients_figure

        return gradients_figure(_json(args.raw, "rows", "eos-search ablate gradients --out"))
    if args.figure == "search":
        from eos_search.plots.search import search_figure
        from eos_search.run_folder import read_records

        return search_figure(read_records(args.folder))
    return _of_profile(args)


def _of_profile(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    from eos_vllm import profiles

    budgets = [None] if args.budgets == "own" else [parse_tokens(b, "--budgets") for b in args.budgets.split(",")]
    profile = profiles.resolve(args.profile)
    if args.figure == "profile":
        from eos_search.plots.search import profile_figure

        return profile_figure(profile, budgets)
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils.logging import disable_progress_bar

    from eos_search.chats import chat_prompt
    from eos_search.frozen import model_path
    from eos_search.plots.patches import kept_patches, patches_figure

    image, question = picture(args.image, args.question, args.index)
    disable_progress_bar()
    path = model_path(args.model)
    try:
        model = AutoModelForImageTextToText.from_pretrained(path, dtype="auto")
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise EosError("--model", args.model, f"it cannot be loaded ({error})", "give a LLaVA's directory") from None
    kept = kept_patches(model, processor, profile, chat_prompt(processor, question, 1), image, budgets)
    return patches_figure(kept, profile.name, question)


def picture(file: Path | None, question: str | None, index: int) -> tuple[Any, str]:
    """The image to draw over and what is asked about it: a file's, or the first question on one of ClutterVQA's.

    Raises:
        EosError: an image without a question, or a file that is no image.
    """
    from PIL import Image

    if file is None:
        from eos_vllm.cluttervqa import make_sample

        sample = make_sample("test", index)
        return sample.image, question or sample.questions[0].text
    if not question:
        raise EosError("--question", question, "an image needs one", "give --question: what is kept depends on it")
    try:
        return Image.open(file).convert("RGB"), question
    except OSError as error:
        raise EosError("--image", str(file), f"it cannot be read ({error})", "give the path of an image") from None


def _json(file: Path, field: str = "gaussian", source: str = "eos-vllm verify --json") -> dict[str, Any]:
    """A JSON document that holds ``field``, as ``source`` makes it."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problem = f"it cannot be read ({error})"
        raise EosError("--raw", str(file), problem, f"give what `{source}` makes") from None
    if not isinstance(document, dict) or field not in document:
        raise EosError("--raw", str(file), f"holds no {field}", f"give what `{source}` makes")
    return document


def _source(args: argparse.Namespace) -> dict[str, Any]:
    """What the figure was drawn from, without folders of the machine."""
    given = {name: getattr(args, name, None) for name in ("raw", "folder", "image")}
    return {"source": {name: Path(value).name for name, value in given.items() if value is not None}}
