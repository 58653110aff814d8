"""`eos-vllm plan`: what a profile keeps per layer, and what that saves against stock, before anything is served."""

import argparse
import json
from typing import Any, get_args

from eos_vllm import profiles
from eos_vllm.analysis.comparison import CostComparison, compare, measured_by
from eos_vllm.analysis.cost import DTYPE_BYTES, flops_crossover
from eos_vllm.cli.profile import where
from eos_vllm.cli.shape_model import PRESET_NAMES
from eos_vllm.core.budget import parse_budget
from eos_vllm.core.errors import BudgetError, SettingError
from eos_vllm.core.plan import Planner
from eos_vllm.core.profile import BudgetMeasure, Profile
from eos_vllm.models.geometry import ModelGeometry, geometry
from eos_vllm.models.image_sizes import image_tokens, parse_image_size
from eos_vllm.models.model_files import model_config
from eos_vllm.models.shapes import SHAPES

MIB = 1 << 20


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `plan` to the `eos-vllm` command."""
    parser = subparsers.add_parser(
        "plan",
        help="print what a profile keeps per layer, and its KV memory and FLOPs against stock",
        description="Plan a prompt under a profile. FLOPs are those of the decoder layers; their ratio is a ceiling.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--profile", metavar="FILE|NAME", help="a profile, or a name of `profile list`")
    which.add_argument("--compare", metavar="A,B,...", help="profiles in one table at equal cost (--measure, --at)")
    parser.add_argument(
        "--measure",
        default="layer_average",
        choices=get_args(BudgetMeasure),
        help="of --compare (default layer_average)",
    )
    parser.add_argument("--at", metavar="N", help="visual tokens by that measure, for --compare")
    parser.add_argument("--model", metavar="DIR|SHAPE", help=f"a directory, or {', '.join((*SHAPES, *PRESET_NAMES))}")
    parser.add_argument(
        "--retain", nargs="+", metavar="N|P%", help="retain budgets, tokens or shares (default: the profile's own)"
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--image", metavar="WxH", help="size of an image in pixels, where the model takes any (--model DIR)"
    )
    size.add_argument(
        "--visual-tokens", type=int, metavar="N", help="visual tokens of an image, where it has any number"
    )
    parser.add_argument("--text-tokens", type=int, default=88, metavar="N", help="text of the prompt (default 88)")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="images of the prompt (default 1)")
    parser.add_argument("--dtype", default="float16", choices=DTYPE_BYTES, help="of the KV cache (default float16)")
    parser.add_argument("--block-size", type=int, default=16, metavar="N", help="tokens per KV block (default 16)")
    parser.add_argument(
        "--exact-counts", action="store_true", help="the profile's counts, not rounded to whole KV blocks"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan for each budget; return 0."""
    if args.compare is not None:
        return run_compare(args)
    profile = profiles.resolve(args.profile)
    model = find_geometry(profile, args.model)
    visual_tokens = example(profile, args)
    planner = Planner(profile, block=1 if args.exact_counts else args.block_size, example=visual_tokens)
    budgets = [parse_budget(value, "retain") for value in args.retain or [str(planner.budget)]]
    plans = [
        compare(model, planner, args.text_tokens, args.images, budget, args.dtype, args.block_size)
        for budget in budgets
    ]
    if args.json:
        prompt = {
            "text_tokens": args.text_tokens,
            "images": args.images,
            "dtype": args.dtype,
            "block_size": args.block_size,
            "visual_tokens": visual_tokens,
        }
        head = {"profile": profile.name, "measure": profile.budget.measure, "prompt": prompt}
        print(json.dumps(head | {"plans": [plan.to_dict() for plan in plans]}, indent=2))
        return 0
    visual = args.images * visual_tokens
    print(f"profile  {profile.name}, {where(profile)}")
    print(f"model    attention's FLOPs equal a layer's matrices at {flops_crossover(model)} tokens")
    print(f"prompt   {args.text_tokens} text + {visual} visual tokens ({args.images} image{'s' * (args.images > 1)})")
    for plan in plans:
        print()
        print(report(plan, profile))
    return 0


def run_compare(args: argparse.Namespace) -> int:
    """Print one line for each profile at equal cost by one measure; return 0."""
    if args.at is None:
        raise SettingError("at", None, "--compare needs a cost to compare at", "give e.g. --at 64")
    at = parse_budget(args.at, "at")
    rows: list[dict[str, Any]] = []
    for source in args.compare.split(","):
        profile = profiles.resolve(source.strip())
        model = find_geometry(profile, args.model)
        measured, block = measured_by(profile, args.measure, model), 1 if args.exact_counts else args.block_size
        planner = Planner(measured, at, block, example=example(profile, args))
        try:
            plan = compare(model, planner, args.text_tokens, args.images, None, args.dtype, args.block_size)
        except BudgetError as error:
            rows.append({"profile": profile.name, "where": where(profile), "refused": error.problem})
        else:
            costs = {k: v for k, v in plan.to_dict().items() if k not in ("stock", "reduced", "budget")}
            rows.append({"profile": profile.name, "where": where(profile), **costs})
    if args.json:
        print(
            json.dumps(
                {"measure": args.measure, "at": at if isinstance(at, int) else str(at), "profiles": rows}, indent=2
            )
        )
        return 0
    tokens = f"{at} visual tokens" if isinstance(at, int) else f"{at} of the visual tokens"
    print(f"at {tokens} by {args.measure}, {args.text_tokens} text tokens, {args.images} image(s)")
    print(f"{'layer avg':>9} {'KV':>6} {'FLOPs':>6} {'final':>5} {'fit':>6}  profile: counts")
    for row in rows:
        if "refused" in row:
            print(f"{'-':>9} {'-':>6} {'-':>6} {'-':>5} {'-':>6}  {row['profile']}: {row['refused']}")
            continue
        print(
            f"{row['layer_average']:9.1f} {row['visual_kv_ratio']:6.1%} {row['flops_ratio']:6.1%} {row['final']:5} "
            f"{1 / row['kv_ratio']:5.2f}x  {row['profile']}: {', '.join(map(str, row['counts']))} ({row['where']})"
        )
    return 0


def example(profile: Profile, args: argparse.Namespace) -> int:
    """Visual tokens of the image that is planned for.

    Raises:
        SettingError: the profile takes images of any size and none is named, or the other way round.
    """
    if (fixed := profile.model.visual_tokens) is not None:
        if args.image is not None or args.visual_tokens not in (None, fixed):
            field, value = ("image", args.image) if args.image is not None else ("visual-tokens", args.visual_tokens)
            raise SettingError(field, value, f"each image has {fixed} visual tokens, whatever its size", "leave it out")
        return fixed
    if args.visual_tokens is not None:
        if args.visual_tokens < 1:
            raise SettingError("visual-tokens", args.visual_tokens, "an image has at least one", "give 1 or more")
        return args.visual_tokens
    if args.image is None:
        problem = "the profile takes images of any size"
        raise SettingError("image", None, problem, "give --image WxH with --model DIR, or --visual-tokens N")
    if args.model is None:
        problem = "how many tokens it has, the model's processor says"
        raise SettingError("image", args.image, problem, "give --model DIR, or --visual-tokens N")
    return image_tokens(args.model, *parse_image_size(args.image))


def find_geometry(profile: Profile, model: str | None) -> ModelGeometry:
    """Sizes of the model that ``--model`` names, or of the known one that has the depth and tokens of the profile.

    Raises:
        EosError: no such model, or none named and none known of the profile's sizes.
    """
    if model is not None:
        return _preset_geometry(model) if model in PRESET_NAMES else geometry(model)
    sizes = (profile.model.num_decoder_layers, profile.model.visual_tokens)
    if sizes[1] is None:
        problem = "no shape of a model that takes images of any size is known"
        raise SettingError("model", None, problem, "give --model DIR")
    for name in (*SHAPES, *PRESET_NAMES):
        known = _preset_geometry(name) if name in PRESET_NAMES else geometry(name)
        if (known.num_decoder_layers, known.visual_tokens) == sizes:
            return known
    problem = f"no model of {sizes[0]} layers and {sizes[1]} visual tokens is known"
    raise SettingError("model", None, problem, "give --model DIR")


def _preset_geometry(name: str) -> ModelGeometry:
    from eos_vllm.models.tiny import PRESETS

    return geometry(model_config(PRESETS[name]))


def report(plan: CostComparison, profile: Profile) -> str:
    """One budget as text: a row for each segment, whose layers are all alike, and the totals."""
    stock, reduced = plan.stock, plan.reduced
    per_layer = stock.segments[0]
    lines = [
        f"retain {plan.budget} ({profile.budget.measure}): keeps {', '.join(map(str, plan.counts))} per image; "
        f"layer average {plan.layer_average:.1f}, visual KV {plan.visual_kv_ratio:.1%} of stock's, "
        f"prefill FLOPs {plan.flops_ratio:.1%}, final {plan.final}",
        f"{'':<7} each layer{'':<48} KV groups",
        _row("layers", "visual", "tokens", "KV MiB", "of stock", "GFLOP", "of stock", "count", "padding", "blocks"),
    ]
    for s in reduced.segments:
        kv, flops = s.kv_bytes / per_layer.kv_bytes, s.flops / per_layer.flops
        lines.append(
            _row(
                *(f"{s.first_layer}-{s.last_layer}", s.visual_tokens, s.tokens),
                *(f"{s.kv_bytes / MIB:.4g}", f"{kv:.1%}", f"{s.flops / 1e9:.4g}", f"{flops:.1%}"),
                *(s.kv_groups, s.padding_layers, s.blocks),
            )
        )
    groups, padding = (sum(getattr(s, name) for s in reduced.segments) for name in ("kv_groups", "padding_layers"))
    kv = reduced.kv_bytes / stock.kv_bytes
    lines += [
        _row(
            *("all", "", "", f"{reduced.kv_bytes / MIB:.4g}", f"{kv:.1%}", f"{reduced.flops / 1e9:.4g}"),
            *(f"{plan.flops_ratio:.1%}", groups, padding, reduced.blocks),
        ),
        f"visual KV  {reduced.visual_kv_bytes / MIB:.4g} MiB, stock {stock.visual_kv_bytes / MIB:.4g} MiB",
        f"KV held    {reduced.allocated_bytes / MIB:.4g} MiB in whole blocks of {reduced.block_bytes / 1024:.4g} KiB, "
        f"stock {stock.allocated_bytes / MIB:.4g} MiB: {1 / plan.kv_ratio:.2f} times as many requests fit",
        f"ceiling    prefill of the language model {plan.prefill_ceiling:.2f} times as fast "
        f"({reduced.flops / 1e9:.4g} of {stock.flops / 1e9:.4g} GFLOP)",
    ]
    return "\n".join(lines)


def _row(layers: object, *cells: object) -> str:
    widths = (8, 8, 9, 9, 9, 9, 7, 8, 7)
    return f"{layers:<7}" + "".join(f" {cell!s:>{width}}" for cell, width in zip(cells, widths, strict=True))
