"""`eos-vllm advise`: the cheapest measured profile and budget that keeps an accuracy and lets so many requests fit."""

import argparse
import json
from pathlib import Path
from typing import get_args

from eos_vllm.analysis.advice import Advice, By, Option, Wish, end_of
from eos_vllm.analysis.advise import Catalogue
from eos_vllm.analysis.choices import choices
from eos_vllm.analysis.cost import DTYPE_BYTES
from eos_vllm.core.errors import SettingError
from eos_vllm.core.profile import Profile
from eos_vllm.models.embedded import SHAPE
from eos_vllm.models.embedded import is_this as is_embedded
from eos_vllm.models.geometry import ModelGeometry, geometry
from eos_vllm.models.model_files import model_config
from eos_vllm.models.shapes import SHAPES

EMBEDDED = "embedded"
MIB = 1 << 20


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `advise` to the `eos-vllm` command."""
    parser = subparsers.add_parser(
        "advise",
        help="name the cheapest measured profile and budget that keeps an accuracy and fits a KV memory",
        description="Choose among measured points. Accuracy and speed are told as measured, with where; the measured "
        "model is the embedded one.",
    )
    parser.add_argument("--kv-gib", type=float, required=True, metavar="GIB", help="KV cache of all ranks together")
    parser.add_argument("--concurrency", type=int, required=True, metavar="N", help="requests that have to fit at once")
    parser.add_argument(
        "--accuracy-floor", type=float, required=True, metavar="SHARE", help="of all tokens' accuracy, such as 0.95"
    )
    parser.add_argument("--by", choices=get_args(By), default="low", help="what reaches the floor (default low: the "
                        "lower end of the 95%% interval)")  # fmt: skip
    parser.add_argument("--prompt", type=int, default=88, metavar="N", help="text tokens of a prompt (default 88)")
    parser.add_argument("--output", type=int, default=256, metavar="N", help="tokens of an answer (default 256)")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="images of a prompt (default 1)")
    parser.add_argument(
        "--model",
        default=EMBEDDED,
        metavar="DIR|SHAPE",
        help=f"model to plan for: a directory, {', '.join(SHAPES)}, or {EMBEDDED} (default)",
    )
    parser.add_argument("--profile", default="all", metavar="A,B,...|all", help="profiles to choose from (default all)")
    parser.add_argument("--dtype", default="float16", choices=DTYPE_BYTES, help="of the KV cache (default float16)")
    parser.add_argument("--block-size", type=int, default=16, metavar="N", help="tokens per KV block (default 16)")
    parser.add_argument("--save", metavar="FILE", help="write the chosen profile, to serve it")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the choice, or what misses and the nearest; return 0, or 1 where there is no choice."""
    wish = Wish(
        kv_gib=args.kv_gib,
        concurrency=args.concurrency,
        accuracy_floor=args.accuracy_floor,
        text_tokens=args.prompt,
        output_tokens=args.output,
        images=args.images,
        by=args.by,
        profiles=() if args.profile == "all" else tuple(name.strip() for name in args.profile.split(",")),
    )
    sizes = model_sizes(args.model)
    catalogue = Catalogue(choices(), sizes, named(args.model), args.dtype, args.block_size)
    advice = catalogue.advise(wish)
    option = advice.choice or advice.nearest
    assert option is not None  # there is one or the other
    if args.save is not None:
        _save(catalogue.profile_of(option), args.save)
    if args.json:
        print(json.dumps({"model": args.model} | advice.model_dump(), indent=2))
    else:
        print(report(advice, wish, args, sizes))
    return 0 if advice.choice is not None else 1


def named(model: str) -> str:
    """The name under which figures are known, where a directory holds the model that was measured."""
    return EMBEDDED if is_embedded(model) else model


def model_sizes(model: str) -> ModelGeometry:
    """Sizes of a model by directory or name; ``embedded`` is the shipped one.

    Raises:
        EosError: there is none.
    """
    if model == EMBEDDED:
        return geometry(model_config(SHAPE))
    return geometry(model)


def _save(profile: Profile, file: str) -> None:
    path = Path(file)
    try:
        with path.open("x", encoding="utf-8") as out:
            out.write(json.dumps(profile.to_dict(), indent=2) + "\n")
    except OSError as error:
        raise SettingError("save", file, f"cannot be written ({error.strerror})", "name a new file") from None


def report(advice: Advice, wish: Wish, args: argparse.Namespace, sizes: ModelGeometry) -> str:
    """The advice as text."""
    option = advice.choice or advice.nearest
    assert option is not None
    images = f"{wish.images} image{'s' * (wish.images > 1)} of {sizes.visual_tokens} visual tokens"
    lines = [f"WARNING    {text}" for text in advice.warnings]
    lines += [
        f"model      {args.model}; {wish.kv_gib:g} GiB of KV cache in {args.dtype}, blocks of {args.block_size} tokens",
        f"request    {images}, {wish.text_tokens} of text, {wish.output_tokens} generated; {wish.concurrency} at once",
        f"floor      {wish.accuracy_floor:.2%} of all tokens' accuracy, {end_of(wish.by)}",
    ]
    lines += [f"misses     {text}" for text in advice.misses]
    lines += [*described(option, "choice" if advice.choice else "nearest"), *_serving(option, args, bool(args.save))]
    if advice.left_out:
        lines.append(f"left out   {len(advice.left_out)} points cannot be planned for this model, the first: "
                     f"{advice.left_out[0]}")  # fmt: skip
    return "\n".join(lines)


def described(option: Option, title: str) -> list[str]:
    """An option as lines of text."""
    relative, accuracy, speed = option.relative, option.accuracy, option.speed
    lines = [
        f"{title:<10} {option.profile} at {option.budget} ({option.measure}): keeps "
        f"{', '.join(map(str, option.counts))} per image, layer average {option.layer_average:.1f}",
        f"fits       {option.requests_fit} requests of {option.kv_bytes / MIB:.4g} MiB; stock: "
        f"{option.stock_requests_fit}",
        f"accuracy   {relative.mean:.1%} ({relative.low:.1%} to {relative.high:.1%}) of all tokens'; right answers "
        f"{accuracy.mean:.1%} ({accuracy.low:.1%} to {accuracy.high:.1%}), measured on {option.model}",
    ]
    if speed is None:
        lines.append("speed      not measured at this point, and not guessed")
    else:
        low, high = speed.stock_ratio_range
        lines.append(
            f"speed      {speed.stock_ratio:.2f} times stock's requests/s ({low:.2f} to {high:.2f} over rounds), "
            f"measured: {speed.measured}"
        )
    return [*lines, f"rests on   {option.source}: {option.about}"]


def _serving(option: Option, args: argparse.Namespace, saved: bool) -> list[str]:
    if option.shipped is not None and not option.scaled:
        profile = option.shipped
    elif saved:
        profile = args.save
    else:
        return ["serve      no shipped profile is this one: write it with --save FILE"]
    exact = " --eos-exact-counts" if option.rounds else ""
    return [f"serve      vllm serve MODEL --eos-profile {profile} --eos-retain {option.budget}{exact}"]
