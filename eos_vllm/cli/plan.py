"""`eos-vllm plan`: what a profile keeps per layer, and what that saves against stock, before anything is served."""

import argparse
import json

from eos_vllm import profiles
from eos_vllm.analysis.comparison import CostComparison, compare
from eos_vllm.analysis.cost import DTYPE_BYTES
from eos_vllm.cli.shape_model import PRESET_NAMES
from eos_vllm.core.budget import parse_budget
from eos_vllm.core.errors import SettingError
from eos_vllm.core.plan import Planner
from eos_vllm.core.profile import Profile
from eos_vllm.models.geometry import ModelGeometry, geometry
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
    parser.add_argument("--profile", required=True, metavar="FILE|NAME", help="a profile, or a name of `profile list`")
    parser.add_argument("--model", metavar="DIR|SHAPE", help=f"a directory, or {', '.join((*SHAPES, *PRESET_NAMES))}")
    parser.add_argument("--retain", nargs="+", metavar="N", help="retain budgets (default: the profile's own)")
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
    profile = profiles.resolve(args.profile)
    model = find_geometry(profile, args.model)
    planner = Planner(profile, block=1 if args.exact_counts else args.block_size)
    budgets = [parse_budget(value, "retain") for value in args.retain or [profile.budget.tokens]]
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
        }
        head = {"profile": profile.name, "measure": profile.budget.measure, "prompt": prompt}
        print(json.dumps(head | {"plans": [plan.to_dict() for plan in plans]}, indent=2))
        return 0
    visual = args.images * profile.model.visual_tokens
    print(f"profile  {profile.name}, reducers after layers {', '.join(map(str, profile.layers))}")
    print(f"prompt   {args.text_tokens} text + {visual} visual tokens ({args.images} image{'s' * (args.images > 1)})")
    for plan in plans:
        print()
        print(report(plan, profile))
    return 0


def find_geometry(profile: Profile, model: str | None) -> ModelGeometry:
    """Sizes of the model that ``--model`` names, or of the known one that has the depth and tokens of the profile.

    Raises:
        EosError: no such model, or none named and none known of the profile's sizes.
    """
    if model is not None:
        return _preset_geometry(model) if model in PRESET_NAMES else geometry(model)
    sizes = (profile.model.num_decoder_layers, profile.model.visual_tokens)
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
        f"final {plan.final}, layer_average {plan.layer_average:.1f}",
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
