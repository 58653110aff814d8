"""`eos-vllm shape-model` and `eos-vllm tiny-model`: write model directories that need no download."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from eos_vllm.core.errors import EosError
from eos_vllm.models.geometry import geometry
from eos_vllm.models.shapes import SHAPES, write_shape_model

# Names only: the presets themselves come with torch, which takes seconds to import.
PRESET_NAMES = ("embedded", "bench-88m")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommands `shape-model` and `tiny-model` to the `eos-vllm` command."""
    shape = subparsers.add_parser(
        "shape-model",
        help="write a published model's config, processor and tokenizer, to serve its shape with dummy weights",
        description="Write everything but the weights; serve it with: vllm serve DIR --load-format dummy",
    )
    shape.add_argument("--like", metavar="NAME", help="the published model (see --list)")
    shape.add_argument("--out", metavar="DIR", type=Path, help="a new or empty directory")
    shape.add_argument("--list", action="store_true", help="list the names and sizes, and write nothing")
    shape.set_defaults(run=run_shape_model)

    tiny = subparsers.add_parser(
        "tiny-model",
        help="write a small LLaVA with random weights that runs without a GPU",
        description="Write a complete small LLaVA. The same preset and seed give the same bytes.",
    )
    tiny.add_argument("--out", metavar="DIR", type=Path, required=True, help="a new or empty directory")
    tiny.add_argument("--preset", metavar="NAME", default="embedded", help=f"one of {', '.join(PRESET_NAMES)}")
    tiny.add_argument("--seed", type=int, default=0, help="another seed, another model (default 0)")
    tiny.set_defaults(run=run_tiny_model)


def run_shape_model(args: argparse.Namespace) -> int:
    """Run `shape-model`; return 0, or 2 after one line on standard error."""
    if args.list:
        for name in SHAPES:
            sizes = geometry(name)
            print(
                f"{name}: {sizes.num_decoder_layers} layers, hidden {sizes.hidden_size}, "
                f"{sizes.num_attention_heads} heads, {sizes.visual_tokens} visual tokens"
            )
        return 0
    for option, value in (("--like", args.like), ("--out", args.out)):
        if value is None:
            return _refuse(f"{option} is missing; give --like NAME and --out DIR, or --list to see the names")
    code = _write(lambda: write_shape_model(args.like, args.out))
    if code == 0:
        print(f"wrote {args.out}; serve it with: vllm serve {args.out} --load-format dummy")
    return code


def run_tiny_model(args: argparse.Namespace) -> int:
    """Run `tiny-model`; return 0, or 2 after one line on standard error."""
    if args.preset not in PRESET_NAMES:
        return _refuse(f"preset={args.preset!r}: is unknown; choose one of {', '.join(PRESET_NAMES)}")
    from eos_vllm.models.tiny import PRESETS, parameter_count, write_tiny_model

    shape = PRESETS[args.preset]
    code = _write(lambda: write_tiny_model(args.out, shape=shape, seed=args.seed))
    if code == 0:
        print(f"wrote {args.out}: {parameter_count(shape) / 1e6:.2f} M parameters, random weights of seed {args.seed}")
    return code


def _write(write: Callable[[], Path]) -> int:
    """Call `write`; a directory that cannot be used is the user's to change, so it ends in one line and code 2."""
    try:
        write()
    except EosError as error:
        return _refuse(str(error))
    except OSError as error:
        return _refuse(f"{error.filename}: {error.strerror}; name a directory that can be written to with --out")
    return 0


def _refuse(message: str) -> int:
    print(f"eos-vllm: {message}", file=sys.stderr)
    return 2
